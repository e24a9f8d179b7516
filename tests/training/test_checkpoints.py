"""A checkpoint of another version of this package is one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt_hf.errors import UserError
from fgpt_hf.training.state import _read_training_state

PROGRESS = {"step": 1, "tokens": 2, "seconds": 0.5, "skipped_steps": 0, "skipped_in_a_row": 0}
STATE: dict[str, Any] = {"optimizer": {}, "random": [], "batches": {}, "progress": PROGRESS, "scaler": None}


def test_the_state_that_this_version_writes_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "training.pt")
    assert _read_training_state(tmp_path / "training.pt") == STATE


@pytest.mark.parametrize(
    ("state", "lacking"),
    [
        ({name: value for name, value in STATE.items() if name != "batches"}, "it lacks batches;"),
        ({}, "it lacks batches, optimizer, progress, random, scaler;"),
        (STATE | {"progress": {"step": 1}}, "it lacks some of its counters;"),
        (STATE | {"progress": PROGRESS | {"new": 1}}, "it lacks some of its counters;"),
    ],
)
def test_a_state_of_another_version_is_refused(tmp_path: Path, state: dict[str, Any], lacking: str) -> None:
    torch.save(state, tmp_path / "training.pt")
    with pytest.raises(UserError, match=f"training.pt was written by another version of fgpt_hf: {lacking}"):
        _read_training_state(tmp_path / "training.pt")
