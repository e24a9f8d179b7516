"""What a model found of the replies before training is computed once, and again only where something else is asked."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from fgpt_hf.data.preference import PairRows, pair_batch
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.losses.objectives import reply_log_probabilities
from fgpt_hf.training.finetuning import reference_log_probabilities
from tests.data.test_preference import EARLIER, USER, encode, pair
from tests.support.tiny import random_model


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairRows:
    monkeypatch.setattr("fgpt_hf.training.finetuning.HF_HOME", str(tmp_path))
    return encode(pair(USER), pair(*EARLIER, USER), pair(USER, chosen="Four."))[0]


def test_the_log_probabilities_are_those_that_training_starts_from(rows: PairRows) -> None:
    model = random_model()
    found = reference_log_probabilities(Accelerator(cpu=True), model, rows.pairs)
    with torch.no_grad():
        expected = reply_log_probabilities(model, pair_batch(rows))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-4)


def test_they_are_computed_once_for_the_same_weights_and_pairs(rows: PairRows, monkeypatch: pytest.MonkeyPatch) -> None:
    model, accelerator = random_model(), Accelerator(cpu=True)
    first = reference_log_probabilities(accelerator, model, rows.pairs)

    def refuse(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Scorer, "score", refuse)
    assert (reference_log_probabilities(accelerator, random_model(), rows.pairs) == first).all()
    with pytest.raises(AssertionError, match="computed again"):
        reference_log_probabilities(accelerator, model, rows.pairs[:2])
    with torch.no_grad():
        model.model.norm.bias[0] += 1e-3
    with pytest.raises(AssertionError, match="computed again"):
        reference_log_probabilities(accelerator, model, rows.pairs)


def test_a_damaged_cache_is_made_again(rows: PairRows, tmp_path: Path) -> None:
    model, accelerator = random_model(), Accelerator(cpu=True)
    first = reference_log_probabilities(accelerator, model, rows.pairs)
    (path,) = tmp_path.glob("fgpt/reference/*.array")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert (reference_log_probabilities(accelerator, model, rows.pairs) == first).all()
        assert path.read_bytes() == whole
