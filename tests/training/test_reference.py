"""What a model found of the replies before training is computed once, and again only where something else is asked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fgpt_hf.data.preference import PairRows, pair_batch
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.losses.objectives import reply_log_probabilities
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.training.finetuning import (
    REFERENCE,
    LogProbabilities,
    reference_files,
    reference_log_probabilities,
)
from tests.data.test_preference import EARLIER, USER, encode, pair
from tests.support.tiny import random_model


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairRows:
    monkeypatch.setattr("fgpt_hf.training.finetuning.HF_HOME", str(tmp_path))
    return encode(pair(USER), pair(*EARLIER, USER), pair(USER, chosen="Four."))[0]


def reference_of(model: FGPTForCausalLM, *parts: PairRows, checkpoint: Path | None = None) -> list[LogProbabilities]:
    """The log-probabilities that a run begins with, or goes on with from a checkpoint."""
    folder: Any = SimpleNamespace(is_writer=True, checkpoint=checkpoint)
    return reference_log_probabilities(Accelerator(cpu=True), model, parts, folder)


def refuse(*arguments: object) -> None:
    raise AssertionError("computed again")


def test_the_log_probabilities_are_those_that_training_starts_from(rows: PairRows) -> None:
    model = random_model()
    found = reference_of(model, rows[[0, 2]], rows[[1]], rows[[]])
    with torch.no_grad():
        expected = reply_log_probabilities(model, pair_batch(rows[[0, 2, 1]]))
    assert [len(part) for part in found] == [2, 1, 0]
    torch.testing.assert_close(torch.from_numpy(np.concatenate(found)), expected, rtol=1e-5, atol=1e-4)


def test_they_are_computed_once_for_the_same_weights_and_pairs(rows: PairRows, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    (first,) = reference_of(model, rows)
    monkeypatch.setattr(Scorer, "score", refuse)
    assert (reference_of(random_model(), rows)[0] == first).all()
    with pytest.raises(AssertionError, match="computed again"):
        reference_of(model, rows[[0, 1]])
    with torch.no_grad():
        model.model.norm.bias[0] += 1e-3
    with pytest.raises(AssertionError, match="computed again"):
        reference_of(model, rows)


def test_a_damaged_cache_is_made_again(rows: PairRows, tmp_path: Path) -> None:
    model = random_model()
    (first,) = reference_of(model, rows)
    (path,) = tmp_path.glob("fgpt/reference/*.array")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert (reference_of(model, rows)[0] == first).all()
        assert path.read_bytes() == whole


def test_a_run_goes_on_with_those_of_its_checkpoint_bit_by_bit(
    rows: PairRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more pairs held out than before, only theirs are computed: the others were rounded on another machine."""
    train, validation, more = rows[[0, 1]], rows[[2]], rows[[2, 0]]
    recorded = [np.nextafter(part, np.float32(0)) for part in reference_of(random_model(), train, validation)]
    parts = [PairRows(part.pairs, scores) for part, scores in zip((train, validation), recorded, strict=True)]
    (tmp_path / REFERENCE).write_bytes(reference_files(parts)[REFERENCE])
    found = reference_of(random_model(), train, more, checkpoint=tmp_path)
    assert (found[0] == recorded[0]).all() and (found[1] == reference_of(random_model(), more)[0]).all()
    monkeypatch.setattr(Scorer, "score", refuse)
    found = reference_of(random_model(), train, validation, checkpoint=tmp_path)
    assert all((part == scores).all() for part, scores in zip(found, recorded, strict=True))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_a_checkpoint_with_something_else_is_refused(rows: PairRows, tmp_path: Path, content: bytes) -> None:
    (tmp_path / REFERENCE).write_bytes(content)
    with pytest.raises(UserError, match="reference.npz is damaged"):
        reference_of(random_model(), rows, checkpoint=tmp_path)
