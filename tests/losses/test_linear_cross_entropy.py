"""The lean loss is the plain loss: value, gradients, any type, any number of rows; and it never holds the logits."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses import linear_cross_entropy
from fgpt_hf.losses.linear_cross_entropy import softcapped, summed_cross_entropy, token_losses
from fgpt_hf.losses.objectives import LanguageModelObjective
from tests.support.loop_run import ragged_rows
from tests.support.product_shapes import ProductShapes


def problem(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    states = torch.randn(rows, 24).to(dtype).requires_grad_()
    embeddings = torch.randn(9000, 24).to(dtype).requires_grad_()
    labels = torch.randint(0, 9000, (rows,))
    labels[::7] = IGNORED
    return states, embeddings, labels


def plain(
    states: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    return F.cross_entropy(softcapped(states @ embeddings.T, softcap), labels, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [2, 64, 255, 256, 257, 700])
def test_the_sum_and_both_gradients_equal_the_plain_loss(rows: int, softcap: float | None) -> None:
    states, embeddings, labels = problem(rows)
    lean = summed_cross_entropy(states, embeddings, labels, softcap)
    expected = plain(states, embeddings, labels, softcap)
    torch.testing.assert_close(lean, expected, rtol=1e-6, atol=1e-4)
    lean_gradients = torch.autograd.grad(lean * 0.37, (states, embeddings))
    for lean_gradient, gradient in zip(
        lean_gradients, torch.autograd.grad(expected * 0.37, (states, embeddings)), strict=True
    ):
        torch.testing.assert_close(lean_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_sum_is_that_of_rounded_inputs_in_float32() -> None:
    states, embeddings, labels = problem(600)
    with torch.autocast("cpu", torch.bfloat16):
        lean = summed_cross_entropy(states, embeddings, labels)
    logits = (states.bfloat16() @ embeddings.bfloat16().T).float()
    torch.testing.assert_close(lean, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-6, atol=1e-3)
    assert lean.dtype == torch.float32
    lean.backward()
    expected = torch.autograd.grad(plain(states, embeddings, labels), (states, embeddings))
    for parameter, gradient in zip((states, embeddings), expected, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), dim=0) > 0.999


def test_extreme_logits_give_finite_losses() -> None:
    states, embeddings, labels = problem(70)
    lean = summed_cross_entropy(states * 1e4, embeddings, labels)
    torch.testing.assert_close(lean, plain(states * 1e4, embeddings, labels), rtol=1e-6, atol=1.0)


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    states, embeddings, labels = problem(5)
    lean = summed_cross_entropy(states, embeddings, torch.full_like(labels, IGNORED))
    lean.backward()
    assert lean == 0 and not states.grad.any() and not embeddings.grad.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    states, embeddings, labels = problem(5)
    summed_cross_entropy(states, embeddings.detach(), labels).backward()
    assert states.grad is not None and embeddings.grad is None


@pytest.mark.parametrize("rows", [2, 257, 700])
def test_weighted_token_losses_have_the_plain_gradients(rows: int) -> None:
    """Any function of the losses, such as a preference loss, which weighs them by what they are."""
    states, embeddings, labels = problem(rows)
    expected = F.cross_entropy(states @ embeddings.T, labels, reduction="none")
    lean = token_losses(states, embeddings, labels)
    gradients, expected_gradients = (
        torch.autograd.grad(F.logsigmoid(losses[::2].sum() - losses[1::2].sum() * 0.9), (states, embeddings))
        for losses in (lean, expected)
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_are_those_of_each_row(dtype: torch.dtype) -> None:
    states, embeddings, labels = problem(300, dtype)
    logits = (states @ embeddings.T).float()
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(token_losses(states, embeddings, labels), expected, rtol=1e-5, atol=1e-4)


def test_the_objective_is_the_models_own_loss_with_tied_weights() -> None:
    torch.manual_seed(0)
    model = FGPTForCausalLM(
        FGPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
    )
    objective = LanguageModelObjective(model)
    batch = as_batch(ragged_rows(8))
    mean = objective(batch) / objective.num_items(batch)
    mean.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = model(**batch, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(mean, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


# Few shapes: oneDNN keeps compiled code for each one in low precision


@pytest.mark.parametrize("losses", [summed_cross_entropy, token_losses])
def test_in_low_precision_any_number_of_scored_rows_needs_few_shapes(losses: Any) -> None:
    with ProductShapes() as shapes, torch.autocast("cpu", torch.bfloat16):
        for rows in range(1, 1100, 29):
            losses(*problem(rows)).sum().backward()
    assert len(shapes.met) <= 4 * 16  # logits, states' gradients and two parts of the embeddings', at 16 lengths


@pytest.mark.parametrize("rows", [3, 100, 257, 700])
def test_padding_changes_no_bit_and_hides_no_broken_weight(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(losses: Any, broken: bool) -> list[torch.Tensor]:
        states, embeddings, labels = problem(rows)
        with torch.no_grad():
            embeddings[5:] /= 0.0 if broken else 1.0
        with torch.autocast("cpu", torch.bfloat16):
            found = losses(states, embeddings, labels)
        return [found, *torch.autograd.grad(found.sum(), (states, embeddings))]

    kinds = [(losses, broken) for losses in (summed_cross_entropy, token_losses) for broken in (False, True)]
    padded = [results(*kind) for kind in kinds]
    monkeypatch.setattr(linear_cross_entropy, "padded_length", lambda length, device, dtype: length)
    for kind, lean in zip(kinds, padded, strict=True):
        for tensor, plain_tensor in zip(lean, results(*kind), strict=True):
            torch.testing.assert_close(tensor, plain_tensor, rtol=0, atol=0, equal_nan=True)


MEASURE = """
import sys, torch
from fgpt_hf.runtime.hardware import peak_memory_bytes
from fgpt_hf.losses import linear_cross_entropy
from fgpt_hf.losses.linear_cross_entropy import summed_cross_entropy, token_losses
cpu = torch.device("cpu")
states = torch.randn(4096, 32, requires_grad=True)
embeddings = torch.randn(50304, 32, requires_grad=True)
labels = torch.randint(0, 50304, (4096,))
before = peak_memory_bytes(cpu)
if sys.argv[1] == "lean":
    loss = summed_cross_entropy(states, embeddings, labels)
elif sys.argv[1] == "weighted":
    loss = torch.nn.functional.logsigmoid(token_losses(states, embeddings, labels).sum())
else:
    loss = torch.nn.functional.cross_entropy(states @ embeddings.T, labels, reduction="sum")
loss.backward()
print(peak_memory_bytes(cpu) - before)
"""


@pytest.mark.slow
def test_the_lean_losses_need_an_eighth_of_the_memory() -> None:
    lean, weighted, plain_bytes = (
        int(subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("lean", "weighted", "plain")
    )
    assert max(lean, weighted) * 8 <= plain_bytes
