"""Preference pairs become rows: encoded, cut, padded to each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.batches import IGNORED, Batches, ShuffledRows
from fgpt_hf.data.conversations import Message, RowIssues, times_an_epoch
from fgpt_hf.data.packing import Ids
from fgpt_hf.data.preference_pairs import Pair, load_pairs
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.fast_encoding import Encoded, encode_conversations


class TokenizedReply(NamedTuple):
    """The ids of a conversation up to the end of its last reply, and where in them the reply begins."""

    ids: Ids
    start: int


@dataclass(frozen=True)
class PairRows:
    """Pairs of replies, each as long as it is.

    Attributes:
        pairs: chosen and rejected.
        reference: `(N, 2)`, their log-probabilities before training; zero where the loss has no reference.
    """

    pairs: Sequence[tuple[TokenizedReply, TokenizedReply]]
    reference: npt.NDArray[np.float32]

    @classmethod
    def unreferenced(cls, pairs: Sequence[tuple[TokenizedReply, TokenizedReply]]) -> "PairRows":
        return cls(pairs, np.zeros((len(pairs), 2), dtype=np.float32))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, numbers: Sequence[int]) -> "PairRows":
        return PairRows([self.pairs[number] for number in numbers], self.reference[list(numbers)])


class PreferenceData(NamedTuple):
    """What a preference run works with.

    Attributes:
        rows: pairs to learn.
        times: how often an epoch has each of them.
        validation: pairs that are not learnt.
        prompts: what some of those reply to.
        description: a line on the data, and one for each thing that is wrong with some of its rows.
        origin: what a card says of the data, as `provenance.record_provenance` takes it.
    """

    rows: PairRows
    times: Sequence[int]
    validation: PairRows
    prompts: Sequence[list[Message]]
    description: str
    origin: dict[str, Any]

    @property
    def all_pairs(self) -> Sequence[tuple[TokenizedReply, TokenizedReply]]:
        """The pairs to learn, then the held-out ones."""
        return [*self.rows.pairs, *self.validation.pairs]

    def with_reference(self, reference: npt.NDArray[np.float32]) -> "PreferenceData":
        """The same, with the log-probabilities of `all_pairs`."""
        rows, validation = np.split(reference, [len(self.rows)])
        return self._replace(
            rows=replace(self.rows, reference=rows), validation=replace(self.validation, reference=validation)
        )

    @property
    def epoch(self) -> PairRows:
        """The pairs to learn, as often as an epoch has them."""
        return self.rows[[number for number, times in enumerate(self.times) for _ in range(times)]]

    def batches(self, seed: int, rank: int, processes: int) -> Batches:
        return ShuffledRows(self.epoch, seed, rank, processes, pair_batch)

    def validation_batches(self, size: int) -> list[dict[str, Tensor]]:
        numbers = range(len(self.validation))
        return [pair_batch(self.validation[numbers[start : start + size]]) for start in numbers[::size]]


def load_preference_data(run: PreferenceRun, tokenizer: PreTrainedTokenizerBase, context: int) -> PreferenceData:
    """The pairs of `run.dataset_name`, each side of at most `run.max_length` tokens, or of the whole `context`.

    Raises:
        UserError: the data cannot be opened, a row of it is to be refused, a split is empty, or `max_length` is more
            than the context.
    """
    length = run.sequence_length(context)
    flaws = RowIssues()
    read = encode_pairs(tokenizer, load_pairs(run, flaws), length, run, flaws)
    train = [item for item in read if item[0].place >= run.validation_fraction]
    validation = sorted(
        (item for item in read if item[0].place < run.validation_fraction), key=lambda item: item[0].place
    )
    if not train or not validation:
        raise UserError(
            f"{run.dataset_name} with validation_fraction={run.validation_fraction} gives {len(train)} pairs to learn "
            f"and {len(validation)} to hold out, and both are needed{f' ({flaws})' if len(flaws) else ''}"
        )
    sizes = {"train": train, "validation": validation}
    data = {
        name: {"documents": len(part), "tokens": sum(len(reply.ids) for _, pair in part for reply in pair)}
        for name, part in sizes.items()
    }
    description = f"{run.dataset_name}: {len(train):,} pairs to learn, {len(validation):,} held out"
    return PreferenceData(
        PairRows.unreferenced([replies for _, replies in train]),
        [times_an_epoch(pair.origin, pair.times) for pair, _ in train],
        PairRows.unreferenced([replies for _, replies in validation[: run.max_eval_rows]]),
        [list(pair.prompt) for pair, _ in validation[: run.validation_prompts]],
        "\n".join(filter(None, [description, str(flaws)])),
        {"data": data},
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], length: int, run: PreferenceRun, flaws: RowIssues
) -> list[tuple[Pair, tuple[TokenizedReply, TokenizedReply]]]:
    """The pairs with their ids, no longer than `length`.

    What cannot be learnt from, and what is cut, goes to `flaws`; UserError where the run refuses it.
    """
    encoded = iter(encode_conversations(tokenizer, [said for pair in pairs for said in pair.conversations]))
    read = []
    for pair, *sides in zip(pairs, encoded, encoded, strict=True):
        try:
            replies = _replies(sides, length)
        except ValueError as error:
            flaws.note(pair.origin, str(error), run.bad_rows)
            continue
        if any(isinstance(side, Encoded) and len(side.ids) > length for side in sides):
            flaws.note(pair.origin, f"it is longer than {length} tokens", run.long_rows)
            if run.long_rows == "skip":
                continue
        read.append((pair, replies))
    return read


def last_reply(chat: Encoded) -> TokenizedReply:
    """A conversation up to the end of its last reply.

    Raises:
        UserError: the template marks none.
    """
    places = np.flatnonzero(chat.replies)
    if not len(places):
        raise UserError(
            "the chat template does not mark what the assistant says: it needs {% generation %} around the replies"
        )
    end = int(places[-1]) + 1
    others = np.flatnonzero(~chat.replies[:end])
    return TokenizedReply(chat.ids[:end], int(others[-1]) + 1)


def pair_batch(rows: PairRows) -> dict[str, Tensor]:
    """Rows as `input_ids` and `labels`, `(B, 2, T)`, padded behind to the longest reply, and `reference`, `(B, 2)`."""
    replies = [reply for pair in rows.pairs for reply in pair]
    ids = [torch.from_numpy(reply.ids.astype(np.int64)) for reply in replies]
    labels = [
        torch.where(torch.arange(len(tokens)) < reply.start, IGNORED, tokens)
        for tokens, reply in zip(ids, replies, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True).unflatten(0, (len(rows), 2)),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED).unflatten(0, (len(rows), 2)),
        "reference": torch.from_numpy(rows.reference),
    }


def _replies(sides: Sequence[Encoded | ValueError], length: int) -> tuple[TokenizedReply, TokenizedReply]:
    """Chosen and rejected, cut to `length`; UserError where they cannot be told apart in what is left."""
    for side in sides:
        if isinstance(side, ValueError):
            raise side
    chosen, rejected = (last_reply(side) for side in sides if isinstance(side, Encoded))
    if max(chosen.start, rejected.start) >= length:
        raise UserError(f"its prompt alone is longer than {length} tokens")
    if np.array_equal(chosen.ids[:length], rejected.ids[:length]):
        raise UserError("its replies are equal as far as they are read")
    return TokenizedReply(chosen.ids[:length], chosen.start), TokenizedReply(rejected.ids[:length], rejected.start)
