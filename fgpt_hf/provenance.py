"""Where a run's model comes from: what a model card says of data, machine and software, recorded while it is known."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fgpt_hf.folders import RunFolder
from fgpt_hf.hardware import device_name
from fgpt_hf.runs import Run, TextSource, TuningRun
from fgpt_hf.sources import parse_mixture

PROVENANCE = "provenance.json"
PACKAGES = ("fgpt-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def record_provenance(folder: RunFolder, accelerator: Accelerator, origin: Mapping[str, Any]) -> None:
    """Write `provenance.json` into the run's folder: device, processes, versions, the code's commit, and `origin`.

    `local` are the model and the data that the run names and that lie on this machine, so on no Hub.

    `origin` is what is known of the data: `source`, fields of the run that describe the text where the run itself names
    rows made of it, and `data`, which maps a split to how many `documents` and `tokens` it has.
    """
    if not folder.is_writer:
        return
    provenance = {
        **origin,
        "local": [name for name in _named(folder.run) if Path(name).exists()],
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "versions": {"Python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }
    known = {name: value for name, value in provenance.items() if value is not None}
    (folder.path / PROVENANCE).write_text(json.dumps(known, indent=1), encoding="utf-8")


def _named(run: Run) -> list[str]:
    """The model and the data that a run begins with, as it names them."""
    if isinstance(run, TuningRun):
        return [run.model_name_or_path, *(share.name for share in parse_mixture(run.dataset_name))]
    return [run.dataset_name] if isinstance(run, TextSource) else []


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the project itself, where it runs from its folder
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, or None where it is installed or has been changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    questions = (["ls-files", "--error-unmatch", __file__], ["status", "--porcelain", "-uno"], ["rev-parse", "HEAD"])
    try:
        answers = [subprocess.run([*git, *question], capture_output=True, text=True) for question in questions]
    except OSError:  # no git
        return None
    tracked, changes, commit = answers
    is_known = tracked.returncode == 0 and changes.stdout == ""  # not some other project's, around an installed copy
    return commit.stdout.strip() if is_known else None
