"""How likely a causal language model finds given tokens after given tokens: the engine of every likelihood benchmark.

Rows that begin alike, such as the four endings of one context, are read as one tree, about half the tokens on
HellaSwag; only tokens that predict a scored one get logits, and the softmax is float32.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from inspect import signature
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.prefix_tree import Row, Tensors, Tree, as_tensors, batches, build_prefix_tree
from fgpt_hf.losses.linear_cross_entropy import token_scores

# On a CPU more gains nothing and pads more; on a GPU it is enough to keep it busy.
TOKENS_PER_BATCH = {"cpu": 512, "cuda": 32_768}

PROBE = [Row((11, 5, 7, 3, 9), 2), Row((11, 5, 7, 8, 4, 6), 3)]


class Score(NamedTuple):
    """Of one row: the sum of the scored tokens' log-likelihoods in nats; whether each was the model's first choice."""

    log_likelihood: float
    likeliest: bool


class Scorer:
    """Scores rows with a model as it is, on all processes.

    Results do not depend on the number of processes or the order of the groups; on `tokens_per_batch` only as far as
    sums of floating-point numbers depend on the shape of their batch.

    Args:
        model: any causal language model of transformers, on the accelerator's device.
        tokens_per_batch: how many tokens, padding included, go through the network at once; more for a longer group.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, tokens_per_batch: int | None = None) -> None:
        kind = accelerator.device.type
        self.accelerator, self.model = accelerator, model
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(kind, TOKENS_PER_BATCH["cpu"])

    def score(self, groups: Sequence[Sequence[Row]], title: str = "") -> list[list[Score]]:
        """The scores of each group's rows, in the order given; rows of a group share the context that they have alike.

        Every process must call it with the same groups, and every process gets all scores.

        Raises:
            UserError: a log-likelihood is not a finite number.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():  # one block, so that weights are cast once
                own = dict(self._scores(groups, title))
        finally:
            self.model.train(was_training)
        found = {key: score for part in gather_object([own]) for key, score in part.items()}
        scores = [[found[number, place] for place in range(len(group))] for number, group in enumerate(groups)]
        for number, group in enumerate(scores, start=1):
            if not all(math.isfinite(score.log_likelihood) for score in group):
                raise UserError(
                    f"{title or 'scoring'}: the log-likelihoods of example {number} are "
                    f"{[score.log_likelihood for score in group]}: the model's weights or its precision are broken"
                )
        return scores

    def _scores(self, groups: Sequence[Sequence[Row]], title: str) -> Iterator[tuple[Hashable, Score]]:
        """`((group, row), score)` for this process's share of the batches."""
        accelerator = self.accelerator
        trees = [
            build_prefix_tree([(number, place) for place in places], [group[place] for place in places])
            for number, group in enumerate(groups)
            for places in ([range(len(group))] if self.reads_trees else [[place] for place in range(len(group))])
        ]
        own = list(batches(trees, self.tokens_per_batch))[accelerator.process_index :: accelerator.num_processes]
        silent = not (title and accelerator.is_main_process)
        with tqdm(total=sum(map(len, own)), desc=title, unit="ex", disable=silent, leave=False) as bar:
            for batch in own:
                yield from self._batch_scores(batch)
                bar.update(len(batch))

    def _batch_scores(self, trees: Sequence[Tree]) -> Iterator[tuple[Hashable, Score]]:
        tensors = self._as_tensors(trees)
        losses, likeliest = self._token_scores(tensors)
        keys = [key for tree in trees for key in tree.keys]
        owners = tensors.owners.cpu()
        nats = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, owners, losses.cpu().double())
        misses = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, owners, (~likeliest).long().cpu())
        for key, loss, missed in zip(keys, nats.tolist(), misses.tolist(), strict=True):
            yield key, Score(-loss, missed == 0)

    def _token_scores(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The loss of each target in nats, and whether it was the likeliest token, `(N,)`."""
        inputs = self._tree_inputs(tensors) if self.reads_trees else _row_inputs(tensors)
        if self.has_plain_head:
            states = self._states(inputs)[tensors.sources]
            return token_scores(states, self._embeddings, tensors.places, tensors.targets)
        logits = self._logits(inputs)[tensors.sources][tensors.places].float()
        losses = nn.functional.cross_entropy(logits, tensors.targets, reduction="none")
        return losses, logits.argmax(dim=1) == tensors.targets

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        """The final hidden states, `(R * L, D)`."""
        return self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def _tree_inputs(self, tensors: Tensors) -> dict[str, Tensor]:
        mask = tensors.sees[:, None]
        if self.model.config._attn_implementation == "eager":  # which adds the mask to its scores
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
        return {"input_ids": tensors.input_ids, "position_ids": tensors.position_ids, "attention_mask": mask}

    @cached_property
    def _embeddings(self) -> Tensor:
        weight = self.model.get_output_embeddings().weight
        kind = weight.device.type
        return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether the logits are the product of final states and output embeddings, no bias, scale or cap on them."""
        if self.model.get_output_embeddings() is None:
            return False
        product = self._states(_row_inputs(self._probe_rows)) @ self._embeddings.T
        return product.shape == self._probe_logits.shape and torch.equal(product.float(), self._probe_logits.float())

    @cached_property
    def reads_trees(self) -> bool:
        """Whether the network obeys masks and positions of any shape, so that a tree gives what its rows would give.

        No class says so: it is tried. A network that sees only a window of the latest tokens has no use for trees.
        """
        if self.model.config._attn_implementation not in ("sdpa", "eager") or has_window(self.model):
            return False
        if "position_ids" not in signature(self.model.forward).parameters:
            return False
        tree = self._as_tensors([build_prefix_tree(range(len(PROBE)), PROBE)])
        try:
            logits = self._logits(self._tree_inputs(tree))[tree.sources][tree.places]
        except (TypeError, ValueError, IndexError, RuntimeError):  # a mask of four dimensions is more than it can take
            return False
        expected = self._probe_logits[self._probe_rows.sources][self._probe_rows.places]
        tolerance = 1e-4 if logits.dtype == torch.float32 else 0.03
        return bool((logits - expected).norm() <= tolerance * expected.norm())

    @cached_property
    def _probe_rows(self) -> Tensors:
        return self._as_tensors([build_prefix_tree([number], [row]) for number, row in enumerate(PROBE)])

    @cached_property
    def _probe_logits(self) -> Tensor:
        return self._logits(_row_inputs(self._probe_rows))

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """The logits of every token, `(R * L, V)`."""
        return self.model(**inputs, use_cache=False).logits.flatten(0, 1)

    def _as_tensors(self, trees: Sequence[Tree]) -> Tensors:
        return Tensors(*(tensor.to(self.accelerator.device) for tensor in as_tensors(trees)))


def has_window(model: PreTrainedModel) -> bool:
    """Whether some layer sees less than all earlier tokens, or sees them through a state."""
    config = model.config.get_text_config()
    if layers := getattr(config, "layer_types", None):
        return any(layer != "full_attention" for layer in layers)
    return any(value for name, value in config.to_dict().items() if "window" in name or "chunk_size" in name)


def _row_inputs(tensors: Tensors) -> dict[str, Tensor]:
    """What any model reads: trees of one row each, padded on the right."""
    return {"input_ids": tensors.input_ids, "attention_mask": tensors.is_token.long()}
