"""No call in a step waits for the device: losses are read later, and bad steps are left out by the device itself."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses import linear_cross_entropy
from fgpt_hf.losses.objectives import LanguageModelObjective, Objective, PreferenceLossConfig, PreferenceObjective
from fgpt_hf.model import packed_attention
from fgpt_hf.runtime import transfers
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.training import step
from fgpt_hf.training.optim import build_optimizer
from fgpt_hf.training.state import Progress, TrainingState
from fgpt_hf.training.step import Stepper, TakenStep
from tests.support.loop_run import ragged_rows

DEVICE = torch.device("cpu")
READS_A_VALUE = (DataDependentOutputException, DynamicOutputShapeException)  # as .item() and selections by a mask do


class OneGPU:
    """The part of `Accelerator` that a step calls, on a device of which torch knows shapes and types only."""

    device, num_processes, scaler = DEVICE, 1, None

    def prepare_optimizer(self, optimizer: Any) -> Any:
        return optimizer

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def no_sync(self, module: nn.Module) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)


@contextmanager
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors have no values, so that reading one raises, and let the code take the ways that it takes on CUDA."""
    monkeypatch.setattr(linear_cross_entropy, "_scored_rows", as_on_a_gpu)
    monkeypatch.setattr(packed_attention, "_kernel_takes", lambda query: True)
    monkeypatch.setattr(step, "to_device", on_gpu)
    monkeypatch.setattr(step, "HostCopy", lambda values: SimpleNamespace(values=values))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in batch.items()}


def as_on_a_gpu(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_scored_rows` does there."""
    scored = labels != IGNORED
    return states.masked_fill(~scored[:, None], 0.0), labels.clamp(min=0), scored


def put_on_gpu(model: nn.Module) -> None:
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device=DEVICE)
                module._parameters[name] = moved.setdefault(parameter, nn.Parameter(empty))


def take_step(objective: Objective, micro_batches: list[dict[str, Tensor]], attention: str, optim: str) -> TakenStep:
    model, accelerator, run = objective.model, OneGPU(), PRESETS["quickstart"]
    put_on_gpu(model)
    model.set_attn_implementation(attention)
    objective.num_items = lambda batch: 30.0  # type: ignore[assignment,return-value]  # of a batch on the host
    optimizer = build_optimizer(model, type(run)(preset="quickstart", optim=optim))
    state: Any = TrainingState(accelerator, objective, None, optimizer, None, Progress())
    return Stepper(objective, state, TrainingPlan(1, 4, 2), 1.0).take(micro_batches, 0)


def small_model() -> FGPTForCausalLM:
    shape: dict[str, Any] = {"hidden_size": 108, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FGPTForCausalLM(FGPTConfig(vocab_size=50304, **shape, max_position_embeddings=16)).train()


def packed() -> list[dict[str, Tensor]]:
    return [as_batch(ragged_rows()[:4]), as_batch(ragged_rows()[4:8])]


def pairs() -> list[dict[str, Tensor]]:
    ids = torch.full((4, 2, 12), 7)
    return [{"input_ids": ids, "labels": ids.clone(), "reference": torch.zeros(4, 2)}] * 2


@pytest.mark.parametrize("sampled_softmax", [None, 6144])
@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_step_reads_no_value_from_the_device(
    optim: str, sampled_softmax: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = small_model(), packed()
    with stand_in_gpu(monkeypatch):
        taken = take_step(LanguageModelObjective(model, sampled_softmax), batches, "varlen_attention", optim)
    weights = list(model.parameters())
    assert all(isinstance(weight, FakeTensor) for weight in weights)
    copy: Any = taken.copy
    assert copy.values.shape == (2,) and not taken.may_stop


def test_a_step_on_pairs_reads_no_value_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = small_model(), pairs()
    with stand_in_gpu(monkeypatch):
        taken = take_step(PreferenceObjective(model, PreferenceLossConfig()), batches, "varlen_attention", "muon")
    copy: Any = taken.copy
    assert copy.values.shape == (6,)


def test_the_stand_in_notices_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a selection of the scored rows, as a CPU may make it."""
    selected = linear_cross_entropy._scored_rows
    model, batches = small_model(), packed()
    with stand_in_gpu(monkeypatch), pytest.raises(READS_A_VALUE):
        monkeypatch.setattr(linear_cross_entropy, "_scored_rows", selected)
        put_on_gpu(model)
        LanguageModelObjective(model)(batches[0])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_losses_without_a_selection_equal_those_of_the_scored_rows(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the number of scored rows is not known to the host."""

    def found(function: Any) -> list[Tensor]:
        states, embeddings = (
            torch.randn(*size, generator=torch.Generator().manual_seed(1)) for size in ((9, 8), (50, 8))
        )
        inputs = [states.requires_grad_(), embeddings.requires_grad_()]
        labels = torch.tensor([3, IGNORED, 7, 49, IGNORED, 0, 1, 2, IGNORED])
        losses = function(*inputs, labels, softcap)
        (losses * torch.arange(losses.numel()).view_as(losses).float() if losses.ndim else losses).sum().backward()
        return [losses.detach(), *(each.grad for each in inputs if each.grad is not None)]

    functions = linear_cross_entropy.summed_cross_entropy, linear_cross_entropy.token_losses
    expected = [found(function) for function in functions]

    monkeypatch.setattr(linear_cross_entropy, "_scored_rows", as_on_a_gpu)
    torch.testing.assert_close(
        [found(linear_cross_entropy.summed_cross_entropy), found(linear_cross_entropy.token_losses)], expected
    )


def test_a_copy_to_the_host_is_read_when_it_is_asked_for() -> None:
    assert transfers.HostCopy(torch.tensor([1.5, -2.0])).read() == [1.5, -2.0]
