"""Optimizers with their parameter groups."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.training.muon import Muon


class Rule(NamedTuple):
    """How one kind of parameters learns.

    Attributes:
        kind: what they are.
        is_inner: whether `optim` names their optimizer; AdamW is that of all others.
        decays: whether weight decay applies to them.
    """

    kind: str
    is_inner: bool
    decays: bool


ADAPTERS = Rule("adapters", is_inner=False, decays=False)
VECTORS = Rule("biases, normalizations and other vectors", is_inner=False, decays=False)
EMBEDDINGS = Rule("embeddings and head", is_inner=False, decays=True)
OTHERS = Rule("stacked experts and arrays of other forms", is_inner=False, decays=True)
MATRICES = Rule("matrices inside the layers", is_inner=True, decays=True)
RULES = (ADAPTERS, VECTORS, EMBEDDINGS, OTHERS, MATRICES)
Groups = list[dict[str, Any]]  # as torch's optimizers take them: parameters with their rate and decay

_ADAPTER = re.compile(r"\blora_[AB]\b|\btrainable_tokens_delta\b")
_IN_LAYERS = re.compile(r"\.\d+\.")  # layers are numbered, whatever they are called


def parameter_groups(model: nn.Module) -> list[tuple[Rule, list[tuple[str, nn.Parameter]]]]:
    """Group the trainable parameters of any language model, with their names, by what they are."""
    embeddings = {id(parameter) for parameter in _embeddings(model)}
    groups: dict[Rule, list[tuple[str, nn.Parameter]]] = {rule: [] for rule in RULES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_rule_of(name, parameter, id(parameter) in embeddings)].append((name, parameter))
    return [(rule, members) for rule, members in groups.items() if members]


def _rule_of(name: str, parameter: nn.Parameter, is_embedding: bool) -> Rule:
    if _ADAPTER.search(name):
        return ADAPTERS
    if is_embedding:
        return EMBEDDINGS
    if parameter.ndim < 2:
        return VECTORS
    return MATRICES if parameter.ndim == 2 and _IN_LAYERS.search(name) else OTHERS


def _embeddings(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of all embeddings, and of the output head."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    yield from head.parameters() if isinstance(head, nn.Module) else ()


def describe_groups(model: nn.Module, optim: str) -> str:
    """Return a line for each group: optimizer, decay, number of parameters, what they are, and one of their names.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> [line.split()[:3] for line in describe_groups(model, "muon").splitlines()]
        [['adamw', 'free', '120'], ['adamw', 'decayed', '410,624'], ['muon', 'decayed', '768']]
    """
    return "\n".join(
        f"{_optimizer_of(rule, optim):6} {'decayed' if rule.decays else 'free':8}"
        f"{sum(parameter.numel() for _, parameter in members):>14,}  {rule.kind}, such as {members[0][0]}"
        for rule, members in parameter_groups(model)
    )


def build_optimizer(model: nn.Module, run: Run) -> "JointOptimizer":
    """Build the optimizer that `run.optim` names for the matrices inside the layers, and AdamW for the rest.

    They share one learning rate and one weight decay.
    """
    groups: dict[str, Groups] = {run.optim: [], "adamw": []}
    for rule, members in parameter_groups(model):
        group = {
            "params": [parameter for _, parameter in members],
            "lr": run.learning_rate,
            "weight_decay": run.weight_decay if rule.decays else 0.0,
        }
        groups[_optimizer_of(rule, run.optim)].append(group)
    return JointOptimizer([OPTIMIZERS[name](some, run) for name, some in groups.items() if some])


def require_known_optimizer(run: Run) -> None:
    """Raise UserError if there is no optimizer of the name that the run gives."""
    if run.optim not in OPTIMIZERS:
        raise UserError(f"optim={run.optim!r} is unknown: choose from {', '.join(OPTIMIZERS)}")


def muon(groups: Groups, run: Run) -> torch.optim.Optimizer:
    """Return Muon, its updates scaled to the typical size of AdamW's (Liu et al. 2025, arXiv:2502.16982)."""
    return Muon(groups, momentum=run.muon_momentum, adjust_lr_fn="match_rms_adamw")


def adamw(groups: Groups, run: Run) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return torch.optim.AdamW(groups, betas=(run.adam_beta1, run.adam_beta2), fused=_can_fuse(groups))


OPTIMIZERS: Mapping[str, Callable[[Groups, Run], torch.optim.Optimizer]] = {
    "muon": muon,
    "adamw": adamw,
}


class JointOptimizer:
    """Several optimizers of one model with the interface of one, as far as a training loop and a loss scaler need.

    Attributes:
        skip: a tensor without dimensions that is 1 where a step is to change nothing. Muon and the fused AdamW read it
            on their device, so nothing waits for it; for others it is read here.
    """

    skip: Tensor | None = None

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._weight_decays = [group["weight_decay"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of every group."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    def scale_weight_decay(self, factor: float) -> None:
        """Set the weight decay of every group to a multiple of the one that it was made with."""
        for group, weight_decay in zip(self.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = weight_decay * factor

    @contextmanager
    def keeping_settings(self) -> Iterator[None]:
        """Put back the settings of every group, such as its decay, after a state with settings of its own is loaded.

        Example:
            >>> weight = nn.Parameter(torch.zeros(2))
            >>> optimizer = JointOptimizer([torch.optim.AdamW([weight], weight_decay=0.1)])
            >>> recorded = JointOptimizer([torch.optim.AdamW([weight], weight_decay=0.5)]).state_dict()
            >>> with optimizer.keeping_settings():
            ...     optimizer.load_state_dict(recorded)
            >>> optimizer.param_groups[0]["weight_decay"]
            0.1
        """
        before = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        yield
        for group, settings in zip(self.param_groups, before, strict=True):
            group.update(settings)

    def step(self, closure: None = None) -> None:
        """Update all parameters, unless `skip` is 1."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon) or optimizer.defaults.get("fused"):
                optimizer.grad_scale, optimizer.found_inf = None, self.skip  # type: ignore[attr-defined]  # see GradScaler
            elif self.skip is not None and bool(self.skip):
                continue
            optimizer.step()

    def forget(self) -> None:
        """Drop what the optimizers have gathered, such as moments, as if no step had been taken."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all optimizers."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all optimizers."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def _optimizer_of(rule: Rule, optim: str) -> str:
    return optim if rule.is_inner else "adamw"


def _can_fuse(groups: Groups) -> bool:
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return devices <= {"cpu", "cuda", "mps", "xpu"}
