"""Preference losses, gradients and rewards are TRL's on the same pairs."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.losses.objectives import PreferenceLossConfig, PreferenceObjective, pair_losses, reply_log_probabilities
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import PAD_ID
from tests.support.product_shapes import ProductShapes
from tests.support.tiny import random_model, tokenizer

pytestmark = pytest.mark.usefixtures("own_accelerator")
PAIRS = [
    {"prompt": list(range(40, 46)), "chosen": [300, 301, 302], "rejected": [303, 304, 305, 306, 307]},
    {"prompt": [50], "chosen": [400, 9, 8, 7, 6, 5], "rejected": [9]},
    {"prompt": list(range(60, 80)), "chosen": [500, 501], "rejected": [500, 502]},
]


def batch(reference: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    length = max(len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"])) for pair in PAIRS)
    input_ids = torch.full((len(PAIRS), 2, length), PAD_ID)
    labels = torch.full_like(input_ids, IGNORED)
    for number, pair in enumerate(PAIRS):
        for side, name in enumerate(("chosen", "rejected")):
            start, stop = len(pair["prompt"]), len(pair["prompt"]) + len(pair[name])
            input_ids[number, side, :stop] = torch.tensor(pair["prompt"] + pair[name])
            labels[number, side, start:stop] = input_ids[number, side, start:stop]
    reference = torch.zeros(len(PAIRS), 2) if reference is None else reference
    return {"input_ids": input_ids, "labels": labels, "reference": reference}


def moved(model: FGPTForCausalLM) -> FGPTForCausalLM:
    """The model after some training, so that it differs from its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def gradients(model: FGPTForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_gradients_and_rewards_equal_trls_dpo_trainer(loss_type: str, tmp_path: Path) -> None:
    model, reference = random_model(), random_model()
    config = DPOConfig(tmp_path, loss_type=[loss_type], beta=0.3, use_cpu=True, bf16=False, report_to="none")
    any_pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = DPOTrainer(
        model, reference, config, train_dataset=Dataset.from_list([any_pair]), processing_class=tokenizer()
    )
    moved(model).train()
    rows = [{f"{name}_ids": ids for name, ids in pair.items()} for pair in PAIRS]
    expected = trainer.compute_loss(model, trainer.data_collator(rows))
    expected_gradients = gradients(model, expected)

    with torch.no_grad():
        before = reply_log_probabilities(reference, batch())
    objective = PreferenceObjective(model, PreferenceLossConfig(loss_type, beta=0.3))
    pairs = batch(before)
    loss, *observed = objective(pairs) / objective.num_items(pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_equal(gradients(model, loss), expected_gradients)
    for name, value in zip(objective.metric_names, observed, strict=True):
        assert value.item() == pytest.approx(trainer._metrics["train"][name][0], abs=1e-4), name


@pytest.mark.slow
def test_simpo_equals_trls(tmp_path: Path) -> None:
    model = moved(random_model())
    lengths = (batch()["labels"] != IGNORED).sum(dim=2)
    with torch.no_grad():
        gains = reply_log_probabilities(model, batch())
    config = CPOConfig(
        tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.1, cpo_alpha=0.0, use_cpu=True
    )
    any_pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = CPOTrainer(model, config, train_dataset=Dataset.from_list([any_pair]), processing_class=tokenizer())
    means = gains / lengths
    expected = trainer.cpo_loss(means[:, 0], means[:, 1])[0]
    torch.testing.assert_close(pair_losses(PreferenceLossConfig("simpo", 2.0, 0.1, 0.7), gains, lengths), expected)


def test_label_smoothing_is_the_expected_loss_of_labels_that_are_wrong_so_often() -> None:
    gains, lengths = torch.tensor([[3.0, -4.0]]), torch.tensor([[2, 5]])
    right, wrong = -logsigmoid(torch.tensor(0.7)), -logsigmoid(torch.tensor(-0.7))
    assert pair_losses(PreferenceLossConfig("sigmoid", 0.1, 0.2), gains, lengths).item() == pytest.approx(
        0.8 * right + 0.2 * wrong
    )


def test_before_the_first_step_nothing_is_preferred() -> None:
    model = random_model()
    with torch.no_grad():
        before = reply_log_probabilities(model, batch())
        loss, chosen, rejected, margins, _ = PreferenceObjective(model, PreferenceLossConfig())(batch(before)) / len(
            PAIRS
        )
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    assert max(map(abs, (float(chosen), float(rejected), float(margins)))) < 1e-5


def test_the_sum_does_not_depend_on_how_pairs_are_divided() -> None:
    objective = PreferenceObjective(random_model(), PreferenceLossConfig())
    with torch.no_grad():
        whole = objective(batch())
        parts = [objective({name: tensor[[number]] for name, tensor in batch().items()}) for number in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_in_low_precision_pairs_of_any_length_need_few_shapes_and_keep_within_the_context() -> None:
    context = 62  # which no padded length equals
    model = random_model(max_position_embeddings=context)
    with ProductShapes() as shapes, torch.autocast("cpu", torch.bfloat16):
        for length in range(5, context + 1):
            ids = torch.randint(0, 50_000, (1, 2, length))
            labels = ids.masked_fill(torch.arange(length) < 3, IGNORED)
            reply_log_probabilities(model, {"input_ids": ids, "labels": labels}).sum().backward()
    states, rows = 4 * 3 * 4, 8 * 4  # three products of each of four shapes of weights; of scored rows, as in the loss
    assert len(shapes.met) <= states + rows


def test_in_low_precision_padding_changes_a_reply_by_rounding_only() -> None:
    model = random_model()
    exact = reply_log_probabilities(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        padded = reply_log_probabilities(model, batch())
    torch.testing.assert_close(padded, exact, rtol=0.02, atol=0.02)
