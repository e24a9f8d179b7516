"""Training objectives: what a batch's loss is, as a sum with its number of terms.

Sums rather than means let any division of a batch over micro-batches and processes add up to the same step.

Legend: B rows or pairs of a batch, T tokens of a row, N scored or ignored tokens in one line, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad
from transformers import PreTrainedModel

from fgpt_hf.config.tuning_options import PreferenceLoss
from fgpt_hf.data.batch_fields import DOCUMENT_ENDS, IGNORED
from fgpt_hf.losses.linear_cross_entropy import padded_length, product_dtype
from fgpt_hf.losses.output_head import OutputHead, output_head
from fgpt_hf.model.embeddings import token_embeddings
from fgpt_hf.model.packed_attention import packed_inputs

Batch = Mapping[str, Tensor]


class Objective(nn.Module):
    """A model together with the loss that it is trained on.

    `forward(batch)` returns the sum of the batch's losses, a float32 scalar; or, with metrics to log, a
    `(1 + len(metric_names),)` vector: the sum of the losses, then the sum of each metric.
    """

    metric_names: Sequence[str] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        output_head(model)  # found before the model is sharded

    def num_items(self, batch: Batch) -> Tensor:
        """Return the number of loss terms in the batch, for normalizing over the whole step."""
        raise NotImplementedError

    def gather(self) -> None:
        """Do nothing: FSDP gathers the parameters of a sharded objective before this call, as before `forward`."""


class LanguageModelObjective(Objective):
    """Next-token cross-entropy in nats.

    A batch holds `input_ids` and `labels`, each `(B, T)`, and where rows are packed `position_ids`. As in transformers,
    `labels[:, t]` is the token at `t`, predicted from the state at `t - 1`, and `IGNORED` where it is not scored. Where
    documents end, `(B, K)`, may come with it, for attention that reads bounds (`model.packed_attention`).

    Args:
        sampled_softmax: the number of tokens of the vocabulary that the loss is estimated from; None for all.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> objective = LanguageModelObjective(model)
        >>> batch = {"input_ids": ids, "position_ids": torch.arange(3)[None], "labels": ids}
        >>> objective(batch).shape, int(objective.num_items(batch))
        (torch.Size([]), 2)
    """

    def __init__(self, model: PreTrainedModel, sampled_softmax: int | None = None) -> None:
        super().__init__(model)
        self.sampled_softmax = sampled_softmax

    def num_items(self, batch: Batch) -> Tensor:
        """Return the number of scored tokens."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def forward(self, batch: Batch) -> Tensor:
        """Return the sum of the token losses, a float32 scalar."""
        return next_token_prediction(self.model, batch).summed_loss(self.sampled_softmax)


class Prediction(NamedTuple):
    """Final states, `(N, D)`, each of which predicts one of the labels, `(N,)`, by the model's head."""

    states: Tensor
    labels: Tensor
    head: OutputHead

    def summed_loss(self, sample_size: int | None = None) -> Tensor:
        """Return the sum of the losses in nats, a float32 scalar, or its estimate from a sample of the vocabulary."""
        return self.head.summed_loss(self.states, self.labels, sample_size)

    def token_losses(self) -> Tensor:
        """Return the loss of each label in nats, `(N,)` float32, zero where it is not scored."""
        return self.head.token_losses(self.states, self.labels)


def next_token_prediction(model: PreTrainedModel, batch: Batch) -> Prediction:
    """Return the prediction of each token of a batch but the first of each row."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", DOCUMENT_ENDS)}
    if DOCUMENT_ENDS in batch:
        inputs |= packed_inputs(model, batch[DOCUMENT_ENDS], tokens=batch["input_ids"].shape[1])
    states: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return Prediction(states[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), output_head(model))


class PreferenceLossConfig(NamedTuple):
    """A preference loss and its coefficients, under TRL's names.

    Attributes:
        loss_type: `sigmoid` is DPO (Rafailov et al. 2023, equation 7); `ipo` is IPO (Azar et al. 2023, equation 17,
            with means per token as its authors implement it); `simpo` is SimPO (Meng et al. 2024, equation 6), which
            has no reference model.
        beta: strength of the KL penalty: higher values keep the model closer to the reference model. For SimPO, the
            scale of the rewards.
        label_smoothing: assumed fraction of pairs whose labels are swapped (Mitchell 2023); not for IPO.
        simpo_gamma: target margin between the rewards of SimPO.
    """

    loss_type: PreferenceLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with a reference model."""
        return self.loss_type != "simpo"


class PreferenceObjective(Objective):
    """The loss of preference pairs, with TRL's reward metrics.

    A batch holds `input_ids` and `labels`, each `(B, 2, T)` with the chosen reply first and `labels` `IGNORED` outside
    the replies, and `reference`, `(B, 2)`, the log-probabilities of both replies under the reference model.
    """

    metric_names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def __init__(self, model: PreTrainedModel, config: PreferenceLossConfig) -> None:
        super().__init__(model)
        self.config = config

    def num_items(self, batch: Batch) -> Tensor:
        """Return the number of pairs."""
        return torch.tensor(len(batch["input_ids"]))

    def forward(self, batch: Batch) -> Tensor:
        """Return the sums of losses, chosen rewards, rejected rewards, margins and accuracies, `(5,)`."""
        lengths = (batch["labels"] != IGNORED).sum(dim=2)
        log_ratios = reply_log_probabilities(self.model, batch) - batch["reference"]
        losses = pair_losses(self.config, log_ratios, lengths)
        chosen, rejected = rewards(self.config, log_ratios.detach(), lengths).unbind(dim=1)
        metrics = [chosen, rejected, chosen - rejected, (chosen > rejected).float()]
        return torch.stack([losses, *metrics]).sum(dim=1)


def reply_log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the log-probability of each reply, `(B, 2)` float32, from one forward pass over chosen and rejected.

    Rows are padded on the right, where causal attention hides the padding from every token; further to one of few
    lengths where each would cost memory.
    """
    batch = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    if padding := _padding(model, batch["input_ids"]):
        batch = {
            "input_ids": pad(batch["input_ids"], (0, padding)),
            "labels": pad(batch["labels"], (0, padding), value=IGNORED),
        }
    pairs, two, length = batch["input_ids"].shape
    flat = {name: tensor.view(pairs * two, length) for name, tensor in batch.items()}
    return -next_token_prediction(model, flat).token_losses().view(pairs, two, length - 1).sum(dim=2)


def _padding(model: PreTrainedModel, ids: Tensor) -> int:
    """Return how many tokens to append to rows, `(…, T)`, within the model's context."""
    length = ids.shape[-1]
    wanted = padded_length(length, ids.device.type, product_dtype(token_embeddings(model)))
    context: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or wanted
    return max(0, min(wanted, context) - length)


def pair_losses(config: PreferenceLossConfig, log_ratios: Tensor, lengths: Tensor) -> Tensor:
    """Return the loss of each pair, `(B,)`.

    Args:
        log_ratios: `(B, 2)`, log-probabilities of chosen and rejected replies less those under the reference model, or
            the log-probabilities themselves for a loss without one.
        lengths: `(B, 2)`, tokens of the replies.

    Example:
        >>> config = PreferenceLossConfig("sigmoid", beta=0.1)
        >>> pair_losses(config, torch.tensor([[2.0, -3.0]]), torch.tensor([[4, 4]]))  # -log sigmoid(0.1 * 5)
        tensor([0.4741])
    """
    if config.loss_type != "sigmoid":
        log_ratios = log_ratios / lengths.clamp(min=1)
    difference = log_ratios[:, 0] - log_ratios[:, 1]
    if config.loss_type == "ipo":
        return (difference - 1 / (2 * config.beta)) ** 2
    logits = config.beta * difference - (config.simpo_gamma if config.loss_type == "simpo" else 0.0)
    return -(1 - config.label_smoothing) * logsigmoid(logits) - config.label_smoothing * logsigmoid(-logits)


def rewards(config: PreferenceLossConfig, log_ratios: Tensor, lengths: Tensor) -> Tensor:
    """Return the implicit reward of each reply, `(B, 2)`: beta times the log-ratio, for SimPO per token."""
    return config.beta * (log_ratios / lengths.clamp(min=1) if config.loss_type == "simpo" else log_ratios)
