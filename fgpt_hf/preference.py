"""What preference optimisation minimises: of two replies to a prompt, the chosen one is to be the likelier.

Losses and rewards are TRL's, by TRL's names.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from fgpt_hf.batches import IGNORED
from fgpt_hf.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.objectives import Batch, Objective, next_token_prediction, token_losses
from fgpt_hf.runs import PreferenceLoss


class Aim(NamedTuple):
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

    def __init__(self, model: FGPTForCausalLM, aim: Aim) -> None:
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


def pair_losses(aim: Aim, gains: Tensor, lengths: Tensor) -> Tensor:
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


def rewards(aim: Aim, gains: Tensor, lengths: Tensor) -> Tensor:
    """What each reply is worth by the model's own measure, `(B, 2)`."""
    return aim.beta * (gains / lengths.clamp(min=1) if aim.loss_type == "simpo" else gains)
