"""Load what a preference run trains on: pairs of replies, tokenized, cut, and padded to each other in a batch.

A batch is as wide as its longest reply with its prompt, and the prompt is read twice, once for each reply. Pairs are
not packed: the loss needs a sum over each reply, and a step has few rows. Where most of a batch would be padding, lower
`max_length`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import Batches, ShuffledRows, arrays_fingerprint
from fgpt_hf.data.conversations import Message
from fgpt_hf.data.mixtures import RowIssues, split_rows
from fgpt_hf.data.preference_pairs import Pair, load_pairs
from fgpt_hf.data.sources import DataProvenance
from fgpt_hf.data.splits import NOTHING_HELD_OUT, TRAIN, VALIDATION, SplitSize
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.fast_encoding import UNMARKED, EncodedConversation, encode_conversations
from fgpt_hf.wording import count_of


class TokenizedReply(NamedTuple):
    """A conversation up to the end of its last reply.

    Attributes:
        ids: its tokens.
        start: where in them the reply begins.
    """

    ids: Ids
    start: int


class TokenizedPair(NamedTuple):
    """The chosen and the rejected reply to one prompt."""

    chosen: TokenizedReply
    rejected: TokenizedReply


@dataclass(frozen=True)
class PairRows:
    """Pairs of replies.

    Attributes:
        pairs: the replies, without padding.
        reference: log-probabilities of chosen and rejected before training, `(N, 2)`; zero if the loss uses none.
    """

    pairs: Sequence[TokenizedPair]
    reference: npt.NDArray[np.float32]

    @classmethod
    def without_reference(cls, pairs: Sequence[TokenizedPair]) -> "PairRows":
        """Return rows whose reference is zero."""
        return cls(pairs, np.zeros((len(pairs), 2), dtype=np.float32))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, indices: Sequence[int]) -> "PairRows":
        return PairRows([self.pairs[index] for index in indices], self.reference[list(indices)])

    @property
    def fingerprint(self) -> str:
        """A hash of the replies; their log-probabilities follow from them and the model."""
        replies = [reply for pair in self.pairs for reply in pair]
        starts = np.array([reply.start for reply in replies])
        return arrays_fingerprint(starts, *(reply.ids for reply in replies))


@dataclass(frozen=True)
class PreferenceData:
    """What a preference run reads.

    Attributes:
        rows: the pairs to train on.
        repeats: how often an epoch has each of them.
        validation: the pairs that are held out.
        prompts: the prompts of some of those.
        description: a line on the data, and one for each issue with some of its rows.
        provenance: what is known of the data, for a model card.
    """

    rows: PairRows
    repeats: Sequence[int]
    validation: PairRows
    prompts: Sequence[list[Message]]
    description: str
    provenance: DataProvenance

    @property
    def parts(self) -> tuple[PairRows, PairRows]:
        """The pairs to train on, and the held-out ones."""
        return self.rows, self.validation

    def with_reference(self, rows: npt.NDArray[np.float32], validation: npt.NDArray[np.float32]) -> "PreferenceData":
        """Return the same data with the log-probabilities of the pairs to train on and of the held-out ones."""
        return replace(
            self, rows=replace(self.rows, reference=rows), validation=replace(self.validation, reference=validation)
        )

    @property
    def epoch(self) -> PairRows:
        """The pairs to train on, as often as an epoch has them."""
        return self.rows[[index for index, repeats in enumerate(self.repeats) for _ in range(repeats)]]

    def batches(self, seed: int, rank: int, processes: int) -> Batches:
        """Return the batches of a process."""
        return ShuffledRows(self.epoch, seed, rank, processes, pair_batch)

    def validation_batches(self, size: int) -> list[dict[str, Tensor]]:
        """Return the held-out pairs in batches of `size`."""
        indices = range(len(self.validation))
        return [pair_batch(self.validation[indices[start : start + size]]) for start in indices[::size]]


def load_preference_data(run: PreferenceRun, tokenizer: PreTrainedTokenizerBase, context: int) -> PreferenceData:
    """Return the pairs of `run.dataset_name`, each side of at most `run.max_length` tokens, or of the whole `context`.

    Raises:
        UserError: the data cannot be opened, a row of it is refused, a split is empty, or `max_length` is more than
            the context.
    """
    length = run.sequence_length(context)
    issues = RowIssues()
    encoded = encode_pairs(tokenizer, load_pairs(run, issues), length, run, issues)
    train, validation = split_rows(encoded, run, "pairs", issues)
    validation.sort(key=lambda item: item[0].hash_fraction)
    description = f"{run.dataset_name}: {count_of(len(train), 'pair')} to train on, {len(validation):,} held out"
    nothing_held_out = "" if validation else NOTHING_HELD_OUT
    return PreferenceData(
        PairRows.without_reference([tokenized for _, tokenized in train]),
        [pair.times_an_epoch for pair, _ in train],
        PairRows.without_reference([tokenized for _, tokenized in validation[: run.max_eval_rows]]),
        [list(pair.prompt) for pair, _ in validation[: run.validation_prompts]],
        "\n".join(filter(None, [description, nothing_held_out, str(issues)])),
        DataProvenance({TRAIN: _size(train), VALIDATION: _size(validation)}),
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], length: int, run: PreferenceRun, issues: RowIssues
) -> list[tuple[Pair, TokenizedPair]]:
    """Return the pairs with their ids, cut to `length`.

    Pairs that cannot be trained on, and those that are cut, are added to `issues`.

    Raises:
        UserError: the run refuses such pairs.
    """
    encoded = iter(encode_conversations(tokenizer, [chat for pair in pairs for chat in pair.conversations]))
    found = []
    for pair, *sides in zip(pairs, encoded, encoded, strict=True):
        try:
            tokenized = _tokenized_pair(sides, length)
        except ValueError as error:
            issues.add(pair.row_id, str(error), run.bad_rows)
            continue
        if any(isinstance(side, EncodedConversation) and len(side.ids) > length for side in sides):
            issues.add(pair.row_id, f"it is longer than {length} tokens", run.long_rows)
            if run.long_rows == "skip":
                continue
        found.append((pair, tokenized))
    return found


def last_reply(chat: EncodedConversation) -> TokenizedReply:
    """Return a conversation up to the end of its last reply.

    Raises:
        UserError: the template marks no reply.

    Example:
        >>> is_reply = np.array([False, True, False, False, True, True, False])
        >>> last_reply(EncodedConversation(np.arange(7, dtype=np.uint16), is_reply)).start
        4
    """
    reply_tokens = np.flatnonzero(chat.loss_mask)
    if not len(reply_tokens):
        raise UserError(UNMARKED)
    end = int(reply_tokens[-1]) + 1
    others = np.flatnonzero(~chat.loss_mask[:end])
    return TokenizedReply(chat.ids[:end], int(others[-1]) + 1)


def pair_batch(rows: PairRows) -> dict[str, Tensor]:
    """Return rows as `input_ids` and `labels`, `(B, 2, T)`, padded on the right, and `reference`, `(B, 2)`."""
    replies = [reply for pair in rows.pairs for reply in pair]
    ids = [torch.from_numpy(reply.ids.astype(np.int64)) for reply in replies]
    labels = [
        torch.where(torch.arange(len(tokens)) < reply.start, IGNORED, tokens)
        for tokens, reply in zip(ids, replies, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True).view(len(rows), 2, -1),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED).view(len(rows), 2, -1),
        "reference": torch.from_numpy(rows.reference),
    }


def _tokenized_pair(sides: Sequence[EncodedConversation | ValueError], length: int) -> TokenizedPair:
    """Return chosen and rejected, cut to `length`; UserError if they do not differ in what is left."""
    for side in sides:
        if isinstance(side, ValueError):
            raise side
    chosen, rejected = (last_reply(side) for side in sides if isinstance(side, EncodedConversation))
    if max(chosen.start, rejected.start) >= length:
        raise UserError(f"its prompt alone is longer than {length} tokens")
    if np.array_equal(chosen.ids[:length], rejected.ids[:length]):
        raise UserError("its replies are equal up to max_length")
    return TokenizedPair(*(reply._replace(ids=reply.ids[:length]) for reply in (chosen, rejected)))


def _size(pairs: Sequence[tuple[Pair, TokenizedPair]]) -> SplitSize:
    tokens = sum(len(reply.ids) for _, pair in pairs for reply in pair)
    return SplitSize(documents=len(pairs), tokens=tokens)
