"""Encode contexts and endings as token rows, by the conventions of two established benchmarks.

`encode_joint` follows lm-evaluation-harness for causal models (version 0.4.13, `TemplateLM._encode_pair` and
`HFLM._loglikelihood_tokens`), `encode_separately` Karpathy's HellaSwag script and the original FGPT. With GPT-2's
tokenizer they differ only where the space between context and ending merges with the text before it.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.prefix_tree import Row


class Encoder:
    """Encodes text as rows for a model, truncated from the left to what it can read.

    Args:
        context_length: tokens that the model reads.

    Attributes:
        contexts_cut: how many contexts were truncated so far, counted once for each ending.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> encoder = Encoder(build_tokenizer(), context_length=1024)
        >>> encoder.encode_joint([("The cat sat on", " the mat")])
        [Row(ids=(464, 3797, 3332, 319, 262, 2603), scored=2)]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.contexts_cut = 0

    def encode_joint(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Encode each context and ending as one text, and score what follows the tokens of the context alone.

        White space at the end of a context moves to the ending. An empty context becomes the tokenizer's first token.

        Raises:
            UserError: an ending adds no token, or more tokens than the model reads.
        """
        pairs = [_move_trailing_space(context, ending) for context, ending in pairs]
        contexts = self._encode([context for context, _ in pairs])
        wholes = self._encode([context + ending for context, ending in pairs])
        rows = []
        for (context, ending), context_ids, whole in zip(pairs, contexts, wholes, strict=True):
            ids = (context_ids, whole[len(context_ids) :]) if context else self._without_context(ending)
            self.contexts_cut += len(ids[0]) + len(ids[1]) > self.context_length + 1
            rows.append(self._row(*ids, ending))
        return rows

    def encode_separately(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Encode context and ending each by itself, and score the ending.

        Raises:
            UserError: an ending has no token, or more tokens than the model reads.
        """
        contexts = self._encode([context for context, _ in pairs])
        endings = self._encode([ending for _, ending in pairs], add_special_tokens=False)
        return [
            self._row(context_ids or [self.prefix], ending_ids, ending)
            for context_ids, ending_ids, (_, ending) in zip(contexts, endings, pairs, strict=True)
        ]

    def windows(self, text: str) -> list[Row]:
        """Split a text into rows that together score each of its tokens once.

        As in the harness's `loglikelihood_rolling`, the first token follows the tokenizer's first token, windows do not
        overlap, and the last one is filled up with the tokens before it.
        """
        ids, length = self._encode([text])[0], self.context_length
        rows = [Row((self.prefix, *ids[:length]), min(length, len(ids)))] if ids else []
        for start in range(length, len(ids), length):
            end = min(start + length, len(ids))
            rows.append(Row(tuple(ids[end - length - 1 : end]), end - start))
        return rows

    def prompts(self, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Encode texts, truncated from the left so that a reply of `max_new_tokens` fits after each."""
        prompts = self._encode(texts)
        self.contexts_cut += sum(len(ids) + max_new_tokens > self.context_length for ids in prompts)
        return [ids[-(self.context_length - max_new_tokens) :] for ids in prompts]

    @property
    def prefix(self) -> int:
        """The token that begins a text without a context."""
        tokenizer = self.tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise UserError("the tokenizer has neither a first nor an end-of-text token to begin a text with")
        return int(prefix)

    def _row(self, context: Sequence[int], ending: Sequence[int], text: str) -> Row:
        if not 0 < len(ending) <= self.context_length:
            raise UserError(
                f"the ending {text[:80]!r} has {len(ending)} tokens of its own, and the model can score 1 to "
                f"{self.context_length}"
            )
        ids = (*context, *ending)
        return Row(ids[-(self.context_length + 1) :], len(ending))  # the last token is predicted, not read

    def _without_context(self, ending: str) -> tuple[list[int], list[int]]:
        (ids,) = self._encode([ending], add_special_tokens=False)
        return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])

    def _encode(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), verbose=False, **options)["input_ids"]
        first = str(self.tokenizer.decode([self.prefix]))
        for index, text in enumerate(texts):
            if text.startswith(first):  # the tokenizer must not add it a second time
                encoded[index] = self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return encoded


def _move_trailing_space(context: str, ending: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + ending
