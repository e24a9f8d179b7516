"""Checkpoints of several processes: each writes its own part, in the background, and any number of them reads it.

The weights become one `model.safetensors`, which the main process joins from the parts of all, a tensor at a time. The
optimizer's state stays in shards: torch's distributed checkpoints hold tensors in files of each process, and in
`.metadata` which part of which tensor lies where. That is a pickle, so only the few classes are read that such a file
needs: a checkpoint from elsewhere runs no code. Only tensors are in the shards: other values would be pickles too.
"""

import pickle
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from fgpt_hf.errors import UserError, first_line
from fgpt_hf.runtime.distributed import SOLO_WORK_TIMEOUT, wait_at_most

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


Complete = Callable[[Callable[[Path], None]], Path]  # of `BackgroundWriter.write`


class Part(NamedTuple):
    """A process's part of a checkpoint, on the host: tensors by name, or None where no shards of them are written."""

    weights: dict[str, Tensor] | None = None
    optimizer: dict[str, Tensor] | None = None

    def write(self, folder: Path, processes: dist.ProcessGroup) -> None:
        """Write it; every process must call it, from any thread.

        Args:
            processes: a group that nothing else uses in the meantime.

        Raises:
            OSError: one of the processes could not write; all of them raise it.
        """
        if self.weights is not None:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
            _write(self.weights, writer, processes)
        if self.optimizer is not None:
            _write(self.optimizer, _Writer(folder / FOLDER), processes)


def _write(tensors: dict[str, Tensor], writer: FileSystemWriter, processes: dist.ProcessGroup) -> None:
    try:
        save(tensors, storage_writer=writer, process_group=processes)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise OSError(f"could not write: {first_line(failures[0])}") from error


def _keep_joined_weights(folder: Path) -> None:
    """Leave, of what torch wrote, the file with all weights, under the name that `save_pretrained` gives it."""
    shutil.rmtree(folder / "sharded")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")


def can_join(weights: Mapping[str, Tensor]) -> bool:
    """Return whether torch joins the parts of all tensors: it leaves one without dimensions 0, and wants real numbers.

    Example:
        >>> import torch
        >>> [can_join({"buffer": tensor}) for tensor in (torch.ones(2), torch.tensor(2.0), torch.arange(2))]
        [True, False, False]
    """
    return all(tensor.ndim and tensor.is_floating_point() for tensor in weights.values())


def tensors_of(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in an optimizer's state, by parameter and name.

    Example:
        >>> import torch
        >>> tensors_of({"state": {"weight": {"exp_avg": torch.ones(2), "found": "no tensor"}}, "param_groups": []})
        {'weight exp_avg': tensor([1., 1.])}
    """
    return {
        f"{parameter} {name}": value
        for parameter, values in states["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy this process's part of some tensors to the host, to be written later.

    A process's part of a sharded tensor is its own shard. Tensors that every process holds whole, with the same
    names in the same order, are divided among the processes.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    whole = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
    whole.sort(key=lambda name: tensors[name].numel())  # so each process gets about as much
    others = {name for index, name in enumerate(whole) if index % processes != rank}
    return {
        name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
        for name, tensor in tensors.items()
        if name not in others
    }


def read(states: Mapping[str, Any], checkpoint: Path) -> None:
    """Fill an optimizer's state, which has the tensors of the run, from the shards of any number of processes.

    Every process must call it.

    Raises:
        UserError: the shards are not those of such a state.
    """
    try:
        load(tensors_of(states), storage_reader=_Reader(checkpoint / FOLDER), no_dist=not dist.is_initialized())
    except OSError:
        raise
    except (Exception, CheckpointException) as error:  # torch raises any of them for files that were changed
        reason = first_line(error)
        if isinstance(error, CheckpointException):
            reason = first_line(next(iter(error.failures.values()))[0])
        raise UserError(f"{checkpoint / FOLDER} is damaged, or another state: {reason}") from error


class BackgroundWriter:
    """Writes checkpoints on all processes, each in a thread of its own, while they train."""

    def __init__(self) -> None:
        # Separate from the group that training uses in the meantime; the main process writes more than the others.
        self._processes = dist.new_group(backend="gloo")
        wait_at_most(SOLO_WORK_TIMEOUT, self._processes)  # once connected, which takes no day
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def write(self, part: Part, folder: Path, complete: Complete) -> Future[Path]:
        """Begin to write a folder; every process must call it, and not again before this has ended.

        Args:
            part: what this process writes of it.
            folder: its path.
            complete: writes the rest, calls back with the folder to write the parts to, and returns the path; the main
                process alone calls it.
        """
        return self._threads.submit(self._lead if dist.get_rank() == 0 else self._follow, part, folder, complete)

    def _lead(self, part: Part, folder: Path, complete: Complete) -> Path:
        """Write as the main process, which tells the others where to write; they wait for that."""
        has_announced = False

        def write_part(partial: Path) -> None:
            nonlocal has_announced
            has_announced = True
            self._announced([partial])
            part.write(partial, self._processes)
            if part.weights is not None:  # after the others are done, since they would not learn of a failure
                _keep_joined_weights(partial)

        try:
            return complete(write_part)
        finally:
            if not has_announced:
                self._announced([None])

    def _follow(self, part: Part, folder: Path, complete: Complete) -> Path:
        (partial,) = self._announced([None])
        if partial is None:
            raise OSError(f"the main process could not begin {folder}")
        part.write(partial, self._processes)
        return folder

    def _announced(self, folder: list[Path | None]) -> list[Path | None]:
        """Return what the main process says."""
        dist.broadcast_object_list(folder, src=0, group=self._processes)
        return folder
