"""Every parameter has its optimizer, and every schedule its shape."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.schedules import weight_decay_factor
from fgpt_hf.training.muon import MOST_VALUES, Muon
from fgpt_hf.training.optim import (
    OTHERS,
    JointOptimizer,
    build_optimizer,
    describe_groups,
    parameter_groups,
)
from tests.support.tiny_network import EVERY_NETWORK, tiny_model

RUN = PRESETS["quickstart"]


@pytest.fixture
def model() -> FGPTForCausalLM:
    torch.manual_seed(0)
    return FGPTForCausalLM(
        FGPTConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
        )
    )


@pytest.fixture(params=EVERY_NETWORK)
def any_model(request: pytest.FixtureRequest) -> FGPTForCausalLM:
    return tiny_model(**EVERY_NETWORK[request.param] | {"embedding_norm": True})


def test_every_parameter_is_in_one_group(any_model: FGPTForCausalLM) -> None:
    names = [name for _, members in parameter_groups(any_model) for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in any_model.named_parameters())


def test_only_matrices_decay_and_only_those_inside_the_layers_are_moved_by_muon(any_model: FGPTForCausalLM) -> None:
    for rule, members in parameter_groups(any_model):
        for name, parameter in members:
            assert rule.decays == (parameter.ndim == 2), name
            assert rule.is_inner == (parameter.ndim == 2 and ".layers." in name), name


def test_the_groups_can_be_printed(model: FGPTForCausalLM) -> None:
    lines = describe_groups(model, "muon").splitlines()
    assert [line.split()[0] for line in lines] == ["adamw", "adamw", "muon"]
    assert sum(int(line.split()[2].replace(",", "")) for line in lines) == model.num_parameters()
    assert "muon" not in describe_groups(model, "adamw")


def test_a_frozen_parameter_is_left_out_and_one_of_another_form_learns_by_adamw(model: FGPTForCausalLM) -> None:
    model.get_input_embeddings().requires_grad_(False)
    assert "model.embed_tokens.weight" not in [name for _, members in parameter_groups(model) for name, _ in members]
    model.model.layers[0].experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    groups = {name: rule for rule, members in parameter_groups(model) for name, _ in members}
    assert groups["model.layers.0.experts"] == OTHERS and not OTHERS.is_inner and OTHERS.decays


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_decay_and_rate_reach_the_optimizers(model: FGPTForCausalLM, optim: str) -> None:
    optimizer = build_optimizer(model, replace(RUN, optim=optim))
    optimizer.set_learning_rate(0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, RUN.weight_decay}
    assert len(optimizer.optimizers) == (2 if optim == "muon" else 1)


def test_muons_updates_are_as_large_as_adamws(model: FGPTForCausalLM) -> None:
    """Liu et al. 2025: so one learning rate serves both."""
    sizes = {}
    for optim in ("muon", "adamw"):
        optimizer = build_optimizer(model, replace(RUN, optim=optim, weight_decay=0.0))
        weight = model.model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        sizes[optim] = (weight.detach() - before).square().mean().sqrt().item()
    assert 0.1 < sizes["muon"] / sizes["adamw"] < 1.0


@pytest.mark.parametrize("has_bf16", [False, True])
def test_muon_is_torchs_and_multiplies_what_the_hardware_does(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that the hardware only emulates take a hundred times as long."""
    monkeypatch.setattr("fgpt_hf.training.muon.supports_bf16", lambda device: has_bf16)
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 16), torch.randn(24, 16)
    moved = []
    for optimizer_class in (torch.optim.Muon, Muon):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        optimizer = optimizer_class([weight], lr=1.0, adjust_lr_fn="match_rms_adamw")
        with TypesOfProducts() as types:
            optimizer.step()
        moved.append(weight.detach() - start)
    assert types.seen == {torch.bfloat16 if has_bf16 else torch.float32}
    torch.testing.assert_close(*moved, rtol=0, atol=0 if has_bf16 else 0.02)


class TypesOfProducts(TorchDispatchMode):
    """Notes of which types the matrices are that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_weight_decay_falls_from_its_own_value_to_zero_where_there_is_any(model: FGPTForCausalLM) -> None:
    optimizer = build_optimizer(model, replace(RUN, weight_decay=0.2))
    for kind, middle in {"constant": 0.2, "linear": 0.1, "cosine": 0.1}.items():
        found = []
        for step in (0, 50, 100):
            optimizer.scale_weight_decay(weight_decay_factor(kind, step, 100))
            found.append(sorted({group["weight_decay"] for group in optimizer.param_groups}))
        end = [0.0, 0.2] if kind == "constant" else [0.0]
        assert found == [[0.0, 0.2], [0.0, pytest.approx(middle)], end]


@pytest.mark.parametrize("has_bf16", [False, True])
def test_muon_moves_matrices_of_all_shapes_as_torchs_does_step_by_step(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgpt_hf.training.muon.supports_bf16", lambda device: has_bf16)
    monkeypatch.setitem(MOST_VALUES, "cpu", 1000)  # so that some are orthogonalized together
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=random) for shape in ((24, 16), (16, 24), (16, 16), (24, 16), (24, 16))]
    moved = []
    for optimizer_class in (torch.optim.Muon, Muon):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        optimizer = optimizer_class(weights, lr=0.02, adjust_lr_fn="match_rms_adamw")
        gradients = torch.Generator().manual_seed(1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=gradients)
            optimizer.step()
        moved.append([weight.detach() for weight in weights])
    torch.testing.assert_close(*moved, rtol=0, atol=0 if has_bf16 else 2e-3)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_step_to_skip_leaves_weights_and_moments_as_they_are(model: FGPTForCausalLM, optim: str) -> None:
    optimizer = build_optimizer(model, replace(RUN, optim=optim))

    def step(gradient: float, skip: float) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.skip = torch.tensor(skip)
        optimizer.step()
        states = [value for one in optimizer.optimizers for state in one.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]

    before = step(0.5, skip=0.0)
    for gradient in (float("nan"), float("inf"), 0.0):
        torch.testing.assert_close(step(gradient, skip=1.0), before, rtol=0, atol=0)
    assert not torch.equal(step(0.5, skip=0.0)[0], before[0])


def test_an_optimizer_that_knows_nothing_of_skipping_is_not_called(model: FGPTForCausalLM) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = JointOptimizer([torch.optim.SGD([weight], lr=1.0)])
    for skip, expected in ((1.0, 1.0), (0.0, 0.0)):
        weight.grad, optimizer.skip = torch.ones(2), torch.tensor(skip)
        optimizer.step()
        assert weight.tolist() == [expected] * 2
