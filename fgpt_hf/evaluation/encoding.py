"""Where a context ends and its ending begins, in tokens: each peer's convention to the letter.

`encode_joint` is lm-evaluation-harness' rule for causal models (version 0.4.13, `TemplateLM._encode_pair` and
`HFLM._loglikelihood_tokens`), `encode_separately` that of Karpathy's HellaSwag script and the original FGPT. With
GPT-2's tokenizer they differ only where the space between context and ending belongs to a token with what is before it.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.prefix_tree import Row

DEFAULT_CONTEXT = 2048  # the harness' own, for models and tokenizers that name none


class Encoder:
    """Turns text into rows for a model, cut from the left to what it can read.

    `cut` counts the contexts that were cut, once for each ending.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.cut = 0

    def encode_joint(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Rows of (context, ending), encoded as one text and parted behind the context's own tokens.

        White space at the end of a context belongs to the ending; an empty context is the tokenizer's first token.

        Raises:
            UserError: an ending adds no token, or more tokens than the model reads.
        """
        pairs = [_with_white_space_moved(context, ending) for context, ending in pairs]
        contexts = self._encode([context for context, _ in pairs])
        wholes = self._encode([context + ending for context, ending in pairs])
        rows = []
        for (context, ending), context_ids, whole in zip(pairs, contexts, wholes, strict=True):
            ids = (context_ids, whole[len(context_ids) :]) if context else self._after_nothing(ending)
            self.cut += len(ids[0]) + len(ids[1]) > self.context_length + 1
            rows.append(self._row(*ids, ending))
        return rows

    def encode_separately(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Rows of (context, ending), each encoded by itself.

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
        """Rows that score each token of a text once, each with as much context as the model reads, but for overlaps.

        As in the harness' `loglikelihood_rolling`: the first token follows the tokenizer's first token; later windows
        do not overlap, and the last one is filled up with the tokens before it.
        """
        ids, length = self._encode([text])[0], self.context_length
        rows = [Row((self.prefix, *ids[:length]), min(length, len(ids)))] if ids else []
        for start in range(length, len(ids), length):
            end = min(start + length, len(ids))
            rows.append(Row(tuple(ids[end - length - 1 : end]), end - start))
        return rows

    def prompts(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """The texts' ids, cut from the left so that `room` more tokens can be written."""
        prompts = self._encode(texts)
        self.cut += sum(len(ids) + room > self.context_length for ids in prompts)
        return [ids[-(self.context_length - room) :] for ids in prompts]

    @property
    def prefix(self) -> int:
        """The token that stands where there is no context."""
        tokenizer = self.tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise UserError("the tokenizer has neither a first nor an end-of-text token to begin a text with")
        return prefix

    def _row(self, context: Sequence[int], ending: Sequence[int], text: str) -> Row:
        if not 0 < len(ending) <= self.context_length:
            raise UserError(
                f"the ending {text[:80]!r} has {len(ending)} tokens of its own, and the model can score 1 to "
                f"{self.context_length}"
            )
        ids = (*context, *ending)
        return Row(ids[-(self.context_length + 1) :], len(ending))  # the last token is predicted, not read

    def _after_nothing(self, ending: str) -> tuple[list[int], list[int]]:
        (ids,) = self._encode([ending], add_special_tokens=False)
        return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])

    def _encode(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        if not texts:
            return []
        ids = self.tokenizer(list(texts), verbose=False, **options)["input_ids"]
        first = str(self.tokenizer.decode([self.prefix]))
        for number, text in enumerate(texts):
            if text.startswith(first):  # the tokenizer is not to add it again
                ids[number] = self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return ids


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model reads: what its config says, or its tokenizer, or 2048."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return int(length) if length < 10**9 else DEFAULT_CONTEXT  # a tokenizer without a limit says 10**30


def _with_white_space_moved(context: str, ending: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + ending
