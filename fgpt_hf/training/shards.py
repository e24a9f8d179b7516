"""Optimizer states in shards: every process writes its own part, in the background, and any number of them reads it.

torch's distributed checkpoints hold tensors in files of each process, and in `.metadata` which part of which tensor
lies where. That is a pickle, so only the few classes are read that such a file needs: a checkpoint from elsewhere runs
no code. Only tensors are in the shards, since other values would be pickles too.
"""

import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fgpt_hf.errors import UserError, first_line

FOLDER = "shards"
METADATA = ".metadata"
# What the metadata of tensors consist of.
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "strided"},
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of tensors, and refuses any other class."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of tensors")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads shards, and runs no code that they hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Writer(FileSystemWriter):
    """Writes shards, and not the name of the folder that they were written to."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def staged(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a copy on the host of the tensors in an optimizer's state, by parameter and name, to be written later.

    Example:
        >>> import torch
        >>> staged({"state": {"weight": {"exp_avg": torch.ones(2), "found": "no tensor"}}, "param_groups": []})
        {'weight exp_avg': tensor([1., 1.])}
    """
    return {
        f"{parameter} {name}": value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
        for parameter, values in states["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def write(tensors: dict[str, Tensor], checkpoint: Path, processes: dist.ProcessGroup) -> None:
    """Write this process's shards; every process must call it, in a thread of its own if it likes.

    Args:
        processes: a group that nothing else uses meanwhile.

    Raises:
        OSError: one of the processes could not write, on all of them.
    """
    try:
        save(tensors, storage_writer=_Writer(checkpoint / FOLDER), process_group=processes)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise OSError(f"could not write: {first_line(failures[0])}") from error


def read(states: Mapping[str, Any], checkpoint: Path) -> None:
    """Fill an optimizer's state, which has the tensors of the run, from the shards of any number of processes.

    Every process must call it.

    Raises:
        UserError: the shards are not those of such a state.
    """
    tensors = {
        f"{parameter} {name}": value
        for parameter, values in states["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    try:
        load(tensors, storage_reader=_Reader(checkpoint / FOLDER), no_dist=not dist.is_initialized())
    except OSError:
        raise
    except (Exception, CheckpointException) as error:  # torch raises any for what others made of such files
        reason = first_line(error)
        if isinstance(error, CheckpointException):
            reason = first_line(next(iter(error.failures.values()))[0])
        raise UserError(f"{checkpoint / FOLDER} is damaged, or another state: {reason}") from error


class BackgroundWriter:
    """Writes checkpoints on all processes, each in a thread of its own, while they train."""

    def __init__(self) -> None:
        self._processes = dist.new_group(backend="gloo")  # beside the one that training uses meanwhile
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def write(
        self, tensors: dict[str, Tensor], checkpoint: Path, complete: Callable[[Callable[[Path], None]], Path]
    ) -> Future[Path]:
        """Begin to write; every process must call it, the next time when this has ended.

        Args:
            tensors: this process's part of the optimizer's state, from `staged`.
            checkpoint: the path of the checkpoint.
            complete: writes all of it but the shards, for which it calls back with the folder to write to, and returns
                its path; the main process alone calls it.
        """
        return self._threads.submit(self._write, tensors, checkpoint, complete)

    def _write(
        self, tensors: dict[str, Tensor], checkpoint: Path, complete: Callable[[Callable[[Path], None]], Path]
    ) -> Path:
        if dist.get_rank() == 0:
            return self._lead(tensors, complete)
        (folder,) = self._announced([None])
        if folder is None:
            raise OSError(f"the main process could not begin {checkpoint}")
        write(tensors, folder, self._processes)
        return checkpoint

    def _lead(self, tensors: dict[str, Tensor], complete: Callable[[Callable[[Path], None]], Path]) -> Path:
        """Write the checkpoint as the main process, which tells the others where to; they wait to hear of it."""
        has_announced = False

        def write_shards(folder: Path) -> None:
            nonlocal has_announced
            has_announced = True
            self._announced([folder])
            write(tensors, folder, self._processes)

        try:
            return complete(write_shards)
        finally:
            if not has_announced:
                self._announced([None])

    def _announced(self, folder: list[Path | None]) -> list[Path | None]:
        """Return what the main process says."""
        dist.broadcast_object_list(folder, src=0, group=self._processes)
        return folder
