"""A model class of lm-evaluation-harness that scores as this project does: `lm_eval`'s `hf`, several times faster.

Prompts, tokens, generation and every option are those of the harness's own `hf`, from which the class inherits. Only
the scoring of continuations differs: requests with the same beginning (the endings of a question, and the examples in
front of all questions) are read as one prefix tree, and only the tokens that predict a scored one get logits. The
harness has no entry points for models: importing this module registers the name `fgpt`, which `fgpt lm-eval` does.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from accelerate import Accelerator
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.model.io import model_name

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, and the tokens of context and continuation
# The attention of a tree costs as much as its length squared: rows join one that share this fraction of their tokens
# with the row before, until it has this many tokens, or twice those of a row.
LEAST_SHARED = 0.5
TREE_TOKENS = 1024


@register_model("fgpt")
class FGPTHarnessModel(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """Any causal language model for the harness.

    Args:
        pretrained: a run's folder, a model's folder, its id on the Hub, or a model of transformers.
        tokens_per_batch: tokens, padding included, of one forward pass; by default what suits the device.
        options: those of `hf`.

    Raises:
        UserError: the model is no causal language model.
    """

    def __init__(self, pretrained: Any, tokens_per_batch: int | None = None, **options: Any) -> None:
        super().__init__(model_name(pretrained) if isinstance(pretrained, str) else pretrained, **options)
        if self.backend != "causal":
            raise UserError(f"{pretrained} is not a causal language model: score it with --model hf")
        accelerator = getattr(self, "accelerator", None) or Accelerator(cpu=self.device.type == "cpu")
        self._scorer = Scorer(accelerator, self.model, tokens_per_batch)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, read in windows as `hf` reads it, but all windows at once."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            spans = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            own: list[Request] = [(None, *make_disjoint_window(span)) for span in spans]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(score for score, _ in islice(scores, count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would write it."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        groups = list(shared_beginnings(rows))
        title = "" if disable_tqdm or self.rank else "scoring"
        scores = self._scorer.score([[rows[index] for index in group] for group in groups], title, apart=True)
        answers: dict[int, tuple[float, bool]] = {}
        for group, group_scores in zip(groups, scores, strict=True):
            answers |= {
                index: (score.log_likelihood, score.likeliest) for index, score in zip(group, group_scores, strict=True)
            }
        for index, (texts, _, _) in enumerate(requests):
            if texts is not None:  # of a part of a text, only the sum is kept
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Return what is read, cut from the left to what fits the model; the last token is predicted, not read."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, and the model can score 1 to {self.max_length}"
            )
        return Row(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))


def shared_beginnings(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yield the indices of rows in groups, each of which is to be read as one tree.

    Example:
        >>> list(shared_beginnings([Row((1, 2, 3, 4), 1), Row((7, 8), 1), Row((1, 2, 3, 5), 1)]))
        [[0, 2], [1]]
    """
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(rows)), key=lambda index: tuple(rows[index].ids)):
        ids = rows[index].ids
        shared = _common(rows[group[-1]].ids, ids) if group else 0
        new = len(ids) - shared
        if group and (shared < LEAST_SHARED * len(ids) or tokens + new > max(TREE_TOKENS, 2 * len(ids))):
            yield group
            group, tokens, new = [], 0, len(ids)
        group.append(index)
        tokens += new
    if group:
        yield group


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the beginning that two rows share, in tokens."""
    differing = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))
