"""What must be equal between a run that was disturbed and one that was not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from fgpt_hf.data.shard_records import PREPARED
from fgpt_hf.files import integrity_error, read_json, read_json_lines, sha256_of
from fgpt_hf.training import shards
from fgpt_hf.training.checkpoints import checkpoints

SPEED = {"seconds", "tokens_per_second", "mfu", "data_wait_share", "peak_memory_bytes", "examples_per_second"}
OF_A_START = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}


def unequal(run: Path, expected: Path) -> list[str]:
    """Return the names of all that differs between two finished runs, times and speeds left out."""
    one, other = contents(run), contents(expected)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def contents(run: Path) -> dict[str, Any]:
    """Return what a finished run or preparation left, by name: hashes of files, and values where a file holds times."""
    if (run / PREPARED).is_file():
        return {path.relative_to(run).as_posix(): sha256_of(path) for path in run.rglob("*") if path.is_file()}
    found: dict[str, Any]
    found = {f"model/{path.name}": sha256_of(path) for path in (run / "model").iterdir() if path.name != "README.md"}
    for checkpoint in checkpoints(run / "checkpoints"):
        assert integrity_error(checkpoint) is None
        own = {"training.pt", "manifest.json"}
        files = [path for path in checkpoint.iterdir() if path.is_file() and path.name not in own]
        found |= {f"{checkpoint.name}/{path.name}": sha256_of(path) for path in files}
        if (checkpoint / shards.FOLDER).is_dir():
            found[f"{checkpoint.name}/shards"] = hashed(tensors_of_shards(checkpoint / shards.FOLDER))
        training = torch.load(checkpoint / "training.pt", weights_only=True)
        del training["progress"]["seconds"]
        found |= {f"{checkpoint.name}/training.pt/{name}": hashed(value) for name, value in training.items()}
    metrics = read_json_lines(run / "metrics.jsonl")
    return found | {
        "files": sorted(path.name for path in run.iterdir()),
        "metrics.jsonl": [{name: value for name, value in line.items() if name not in SPEED} for line in metrics],
        "samples.jsonl": (run / "samples.jsonl").read_text("utf-8"),
        "run.yaml": without(yaml.safe_load((run / "run.yaml").read_text("utf-8")), OF_A_START),
        "provenance.json": read_json(run / "provenance.json"),
        "results.json": results(run / "results.json"),
    }


def tensors_of_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a distributed checkpoint, whose files hold them in whichever order the threads wrote."""
    found = shards._Reader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=shards._Reader(folder), no_dist=True)
    return dict(sorted(tensors.items()))


def results(path: Path) -> dict[str, Any]:
    """Return the benchmark results of a run, if it has any, without the time that they took."""
    found = read_json(path) if path.is_file() else {}
    return found | {"runs": [without(task, SPEED) for task in found.get("runs", {}).values()]}


def without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def hashed(value: Any) -> Any:
    """Return a value with a hash in place of every tensor, so that `==` compares all of its bits."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            sha256_of(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
        )
    if isinstance(value, dict):
        return {name: hashed(part) for name, part in value.items()}
    return [hashed(part) for part in value] if isinstance(value, (list, tuple)) else value
