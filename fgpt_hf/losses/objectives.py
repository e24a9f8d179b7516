"""What preference optimisation minimises: of two replies to a prompt, the chosen one is to be the likelier.

Losses and rewards are TRL's, by TRL's names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from fgpt_hf.config.runs import PreferenceLoss
from fgpt_hf.data.batches import IGNORED
from fgpt_hf.losses.linear_cross_entropy import summed_cross_entropy, token_losses
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

Batch = Mapping[str, Tensor]
T = TypeVar("T")


class Objective(nn.Module):
    """A model with what it is trained for: `forward(batch)` is the sum of the batch's losses, a float32 scalar.

    Where an objective has something else to log, `forward` gives `(1 + len(observed),)`: the sums of those behind it.
    """

    observed: Sequence[str] = ()

    def __init__(self, model: FGPTForCausalLM) -> None:
        super().__init__()
        self.model = model

    def weight(self, batch: Batch) -> Tensor:
        """What the sum of the batch's losses is to be divided by, together with the other batches of the step."""
        raise NotImplementedError

    def examine(self, check: Callable[[], T]) -> T:
        """Call `check`, which looks at `model`; parameters that are sharded here are whole meanwhile."""
        return check()


class LanguageModelObjective(Objective):
    """The next-token loss in nats on batches of `input_ids`, `position_ids` and `labels`, `(B, T)`.

    As everywhere in transformers, `labels[:, t]` is the token at `t`, predicted from the state at `t - 1`.
    """

    def weight(self, batch: Batch) -> Tensor:
        """The number of scored tokens."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def forward(self, batch: Batch) -> Tensor:
        return summed_cross_entropy(*next_token_prediction(self.model, batch))


def next_token_prediction(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`(states, output embeddings, labels)`, flat: row n of the states, `(N, D)`, predicts row n of the labels."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1), model.get_output_embeddings().weight, batch["labels"][:, 1:].flatten()


class PreferenceLossConfig(NamedTuple):
    """Which loss, and its numbers.

    Attributes:
        loss_type: `sigmoid` is DPO (Rafailov et al. 2023, equation 7), `ipo` IPO (Azar et al. 2023, equation 17, by
            means per token as its authors have it), `simpo` SimPO (Meng et al. 2024, equation 6), which has no
            reference model.
        beta: how much the rewards count; for IPO the strength of the tie to the reference model.
        label_smoothing: how often a pair is taken to be the wrong way round (Mitchell 2023); not for IPO.
        simpo_gamma: the margin that SimPO is to reach.
    """

    loss_type: PreferenceLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    @property
    def has_reference(self) -> bool:
        return self.loss_type != "simpo"


class PreferenceObjective(Objective):
    """The loss of pairs, with their rewards.

    A batch has `input_ids` and `labels`, `(B, 2, T)`, chosen before rejected, where `labels` are `IGNORED` outside of
    the replies; and `reference`, `(B, 2)`, the log-probabilities of both replies before training.
    """

    observed = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def __init__(self, model: FGPTForCausalLM, aim: PreferenceLossConfig) -> None:
        super().__init__(model)
        self.aim = aim

    def weight(self, batch: Batch) -> Tensor:
        """The number of pairs."""
        return torch.tensor(len(batch["input_ids"]))

    def forward(self, batch: Batch) -> Tensor:
        lengths = (batch["labels"] != IGNORED).sum(dim=2)
        gains = reply_log_probabilities(self.model, batch) - batch["reference"]
        losses = pair_losses(self.aim, gains, lengths)
        chosen, rejected = rewards(self.aim, gains.detach(), lengths).unbind(dim=1)
        observed = [chosen, rejected, chosen - rejected, (chosen > rejected).float()]
        return torch.stack([losses, *observed]).sum(dim=1)


def reply_log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The log-probability of each reply, `(B, 2)` float32: chosen and rejected go through the network together.

    They are padded behind, which no token before sees.
    """
    pairs, two, length = batch["input_ids"].shape
    flat = {name: batch[name].view(pairs * two, length) for name in ("input_ids", "labels")}
    return -token_losses(*next_token_prediction(model, flat)).view(pairs, two, length - 1).sum(dim=2)


def pair_losses(aim: PreferenceLossConfig, gains: Tensor, lengths: Tensor) -> Tensor:
    """The loss of each pair, `(B,)`, from what its replies have gained over the reference in log-probability, `(B, 2)`.

    Without a reference they are the log-probabilities themselves. `lengths`, `(B, 2)`, are the replies' in tokens.
    """
    if aim.loss_type != "sigmoid":
        gains = gains / lengths.clamp(min=1)
    difference = gains[:, 0] - gains[:, 1]
    if aim.loss_type == "ipo":
        return (difference - 1 / (2 * aim.beta)) ** 2
    logits = aim.beta * difference - (aim.simpo_gamma if aim.loss_type == "simpo" else 0.0)
    return -(1 - aim.label_smoothing) * logsigmoid(logits) - aim.label_smoothing * logsigmoid(-logits)


def rewards(aim: PreferenceLossConfig, gains: Tensor, lengths: Tensor) -> Tensor:
    """What each reply is worth by the model's own measure, `(B, 2)`."""
    return aim.beta * (gains / lengths.clamp(min=1) if aim.loss_type == "simpo" else gains)
