"""Log-likelihoods of continuations under any causal language model.

Rows with the same beginning, such as the four endings of one context, are read as one prefix tree, which halves the
tokens on HellaSwag. Only tokens that predict a scored one get logits, and the softmax is float32.

Legend: R trees of a batch, L tokens of the longest one, N targets (scored tokens), D width, V vocabulary.
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
from fgpt_hf.evaluation.prefix_tree import PrefixTree, Row, TreeBatch, batch_trees, build_prefix_tree, collate_trees
from fgpt_hf.losses.linear_cross_entropy import logit_softcap, product_dtype, softcapped, token_scores
from fgpt_hf.model.evaluation_mode import evaluation_mode
from fgpt_hf.model.modeling_fgpt import VARLEN_ATTENTION

# More tokens gain nothing on a CPU and need more padding; on a GPU these keep it busy.
TOKENS_PER_BATCH = {"cpu": 512, "cuda": 32_768}
TAKE_ANY_MASK = ("sdpa", "eager", VARLEN_ATTENTION)  # of attention implementations
PROBE = [Row((11, 5, 7, 3, 9), 2), Row((11, 5, 7, 8, 4, 6), 3)]


class Score(NamedTuple):
    """The log-likelihood of a row's scored tokens in nats, summed, and whether each was the likeliest token."""

    log_likelihood: float
    likeliest: bool


class Scorer:
    """Scores rows of tokens with a model, on all processes.

    Results do not depend on the number of processes or the order of the groups. They depend on `tokens_per_batch` only
    by rounding, since the shape of a batch decides the order of floating-point sums.

    Args:
        model: any causal language model of transformers, on the accelerator's device.
        tokens_per_batch: tokens, padding included, of one forward pass; a longer group is a batch by itself. By default
            what suits the device.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> scorer = Scorer(Accelerator(cpu=True), model)
        >>> ((first, second),) = scorer.score([[Row((5, 6, 7), 1), Row((5, 6, 8), 1)]])  # p(7 | 5 6) and p(8 | 5 6)
        >>> first.log_likelihood < 0
        True
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, tokens_per_batch: int | None = None) -> None:
        device = accelerator.device.type
        self.accelerator, self.model = accelerator, model
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(device, TOKENS_PER_BATCH["cpu"])

    def score(self, groups: Sequence[Sequence[Row]], title: str = "", *, apart: bool = False) -> list[list[Score]]:
        """Return the score of each row, by group. The rows of a group are read as one tree.

        Every process must call this with the same groups, and gets all scores.

        Args:
            title: the label of a progress bar.
            apart: whether this process has groups of its own, which it scores without the others.

        Raises:
            UserError: a log-likelihood is not a finite number.
        """
        # One block of autocast, in which weights are cast once.
        with evaluation_mode(self.model), torch.no_grad(), self.accelerator.autocast():
            own = dict(self._own_scores(groups, title, apart))
        found = own if apart else {key: score for part in gather_object([own]) for key, score in part.items()}
        scores = [[found[number, index] for index in range(len(group))] for number, group in enumerate(groups)]
        for number, group in enumerate(scores, start=1):
            if not all(math.isfinite(score.log_likelihood) for score in group):
                raise UserError(
                    f"{title or 'scoring'}: the log-likelihoods of example {number} are "
                    f"{[score.log_likelihood for score in group]}: the model's weights or its precision are broken"
                )
        return scores

    def _own_scores(self, groups: Sequence[Sequence[Row]], title: str, apart: bool) -> Iterator[tuple[Hashable, Score]]:
        """Yield `((group, row), score)` for this process's part of the batches, or for all of them."""
        accelerator = self.accelerator
        batches = list(batch_trees(list(self._trees(groups)), self.tokens_per_batch))
        own = batches if apart else batches[accelerator.process_index :: accelerator.num_processes]
        silent = not (title and accelerator.is_main_process)
        with tqdm(total=sum(map(len, own)), desc=title, unit="ex", disable=silent, leave=False) as bar:
            for trees in own:
                yield from self._batch_scores(trees)
                bar.update(len(trees))

    def _trees(self, groups: Sequence[Sequence[Row]]) -> Iterator[PrefixTree]:
        """Yield a tree for each group, or for each row if the model does not read trees."""
        for number, group in enumerate(groups):
            keys = [(number, index) for index in range(len(group))]
            if self.reads_trees:
                yield build_prefix_tree(keys, group)
            else:
                yield from (build_prefix_tree([key], [row]) for key, row in zip(keys, group, strict=True))

    def _batch_scores(self, trees: Sequence[PrefixTree]) -> Iterator[tuple[Hashable, Score]]:
        """Yield the key and the score of each row of a batch."""
        batch = self._collate(trees)
        losses, likeliest = self._target_scores(batch)
        keys = [key for tree in trees for key in tree.keys]
        row_of_target = batch.row_of_target.cpu()
        nats = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, row_of_target, losses.cpu().double())
        misses = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, row_of_target, (~likeliest).long().cpu())
        for key, loss, missed in zip(keys, nats.tolist(), misses.tolist(), strict=True):
            yield key, Score(-loss, missed == 0)

    def _target_scores(self, batch: TreeBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of each target in nats, and whether it is the likeliest token, both `(N,)`."""
        inputs = self._tree_inputs(batch) if self.reads_trees else _row_inputs(batch)
        if self.has_plain_head:
            states = self._states(inputs)[batch.source_tokens]
            softcap = logit_softcap(self.model)
            return token_scores(states, self._output_embeddings, batch.source_of_target, batch.target_ids, softcap)
        logits = self._logits(inputs)[batch.source_tokens][batch.source_of_target].float()
        losses = nn.functional.cross_entropy(logits, batch.target_ids, reduction="none")
        return losses, logits.argmax(dim=1) == batch.target_ids

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether logits are the product of final states and output embeddings, with a softcap at most: no bias."""
        if self.model.get_output_embeddings() is None:
            return False
        product = self._states(_row_inputs(self._probe_rows)) @ self._output_embeddings.T
        logits = softcapped(product, logit_softcap(self.model))
        return logits.shape == self._probe_logits.shape and torch.equal(logits.float(), self._probe_logits.float())

    @cached_property
    def reads_trees(self) -> bool:
        """Whether the model obeys any mask and any positions, so that a tree gives the logits of its rows.

        No attribute of a model says so, hence a probe. Layers that see only a window of recent tokens cannot.
        """
        if self.model.config._attn_implementation not in TAKE_ANY_MASK or _has_window(self.model):
            return False
        if "position_ids" not in signature(self.model.forward).parameters:
            return False
        tree = self._collate([build_prefix_tree(range(len(PROBE)), PROBE)])
        try:
            logits = self._logits(self._tree_inputs(tree))[tree.source_tokens][tree.source_of_target]
        except (TypeError, ValueError, IndexError, RuntimeError):  # a model that takes no four-dimensional mask
            return False
        expected = self._probe_logits[self._probe_rows.source_tokens][self._probe_rows.source_of_target]
        tolerance = 1e-4 if logits.dtype == torch.float32 else 0.03
        return bool((logits - expected).norm() <= tolerance * expected.norm())

    @cached_property
    def _probe_rows(self) -> TreeBatch:
        return self._collate([build_prefix_tree([number], [row]) for number, row in enumerate(PROBE)])

    @cached_property
    def _probe_logits(self) -> Tensor:
        return self._logits(_row_inputs(self._probe_rows))

    @cached_property
    def _output_embeddings(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.to(product_dtype(weight))

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the final hidden states, `(R * L, D)`."""
        states: Tensor = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1)

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits of every token, `(R * L, V)`."""
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits.flatten(0, 1)

    def _tree_inputs(self, batch: TreeBatch) -> dict[str, Tensor]:
        """Return a model's inputs for trees, with masks `(R, 1, L, L)`."""
        mask = batch.visible[:, None]
        if self.model.config._attn_implementation == "eager":  # which adds the mask to its scores
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": mask}

    def _collate(self, trees: Sequence[PrefixTree]) -> TreeBatch:
        return TreeBatch(*(tensor.to(self.accelerator.device) for tensor in collate_trees(trees)))


def _row_inputs(batch: TreeBatch) -> dict[str, Tensor]:
    """Return any model's inputs for trees of one row each, padded on the right."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.is_token.long()}


def _has_window(model: PreTrainedModel) -> bool:
    """Return whether some layer does not attend to all earlier tokens, or summarizes them in a state."""
    config = model.config.get_text_config()
    if layers := getattr(config, "layer_types", None):
        return any(layer != "full_attention" for layer in layers)
    return any(value for name, value in config.to_dict().items() if "window" in name or "chunk_size" in name)
