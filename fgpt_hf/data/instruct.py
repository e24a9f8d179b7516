"""Conversations become rows: encoded, cut, packed, each with positions of its own, and what of them is learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data.batches import IGNORED, Batches, ShuffledRows
from fgpt_hf.data.conversations import Conversation, Message, RowIssues, load_conversations, times_an_epoch
from fgpt_hf.data.packing import Ids, fullest_rows
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.fast_encoding import Encoded, encode_conversations
from fgpt_hf.tokenizer.tokenizer import PAD_ID


@dataclass(frozen=True)
class ChatRows:
    """Packed conversations, three arrays `(N, T)`.

    Attributes:
        ids: the tokens, `<|pad|>` where no conversation is.
        positions: each token's place in its conversation; that of padding is 0, so that all of it stands alone.
        learnt: which tokens are scored.
    """

    ids: Ids
    positions: npt.NDArray[np.uint16]
    learnt: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, numbers: Any) -> "ChatRows":
        return ChatRows(self.ids[numbers], self.positions[numbers], self.learnt[numbers])

    def __str__(self) -> str:
        padding = float((self.ids == PAD_ID).mean())
        return (
            f"{len(self):,} rows of {self.ids.shape[1]} tokens, {self.learnt.sum():,} of them learnt, "
            f"{padding:.2%} padding"
        )


class InstructData(NamedTuple):
    """What an instruction run works with.

    Attributes:
        rows: what is learnt.
        validation: what is not.
        prompts: the beginnings of held-out conversations, up to the assistant's first reply.
        description: a line on the data, and one for each thing that is wrong with some of its rows.
        origin: what a card says of the data, as `provenance.record_provenance` takes it.
    """

    rows: ChatRows
    validation: ChatRows
    prompts: list[list[Message]]
    description: str
    origin: dict[str, Any]

    def batches(self, seed: int, rank: int, processes: int) -> Batches:
        return ShuffledRows(self.rows, seed, rank, processes, chat_batch)


def load_instruct_data(run: InstructRun, tokenizer: PreTrainedTokenizerBase, context: int) -> InstructData:
    """The conversations of `run.dataset_name` in rows of `run.max_length` tokens, or of the whole `context`.

    Raises:
        UserError: the data cannot be opened, a row of it is to be refused, a split is empty, or `max_length` is more
            than the context.
    """
    length = run.sequence_length(context)
    flaws = RowIssues()
    conversations = load_conversations(run, flaws)
    chats = encode_chats(tokenizer, conversations, flaws, length, run)
    train = {number: chat for number, chat in chats.items() if conversations[number].place >= run.validation_fraction}
    validation = {number: chat for number, chat in chats.items() if number not in train}
    if not train or not validation:
        raise UserError(
            f"{run.dataset_name} with validation_fraction={run.validation_fraction} gives {len(train)} conversations "
            f"to learn and {len(validation)} to hold out, and both are needed{f' ({flaws})' if len(flaws) else ''}"
        )
    rows = pack_chats(
        [
            chat
            for n, chat in train.items()
            for _ in range(times_an_epoch(conversations[n].origin, conversations[n].times))
        ],
        length,
    )
    description = f"{run.dataset_name}: {len(train):,} conversations in {rows}; {len(validation):,} held out"
    return InstructData(
        rows,
        pack_chats(list(validation.values()), length)[: run.max_eval_rows],
        [_prompt(conversations[number]) for number in list(validation)[: run.validation_prompts]],
        "\n".join(filter(None, [description, str(flaws)])),
        {"data": {"train": _size(train), "validation": _size(validation)}},
    )


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    flaws: RowIssues,
    length: int,
    run: InstructRun,
) -> dict[int, Encoded]:
    """The conversations by their number, no longer than `length`, `replies` being what is learnt.

    What cannot be learnt from, and what is cut, goes to `flaws`; UserError where the run refuses it.
    """
    chats = {}
    encoded = encode_conversations(tokenizer, [conversation.messages for conversation in conversations])
    for number, (conversation, chat) in enumerate(zip(conversations, encoded, strict=True)):
        if isinstance(chat, ValueError):
            flaws.note(conversation.origin, str(chat), run.bad_rows)
            continue
        if len(chat.ids) > length and not chat.replies[:length].any():
            flaws.note(conversation.origin, f"its prompt alone is longer than {length} tokens", run.bad_rows)
            continue
        if len(chat.ids) > length:
            flaws.note(conversation.origin, f"it is longer than {length} tokens", run.long_rows)
            if run.long_rows == "skip":
                continue
        learnt = chat.replies if run.assistant_only_loss else np.arange(len(chat.ids)) > 0
        chats[number] = Encoded(chat.ids[:length], learnt[:length])
    return chats


def pack_chats(chats: Sequence[Encoded], length: int) -> ChatRows:
    """Rows of `length` tokens, each conversation whole in one of them."""
    plan = fullest_rows([len(chat.ids) for chat in chats], length)
    ids = np.full((len(plan), length), PAD_ID, dtype=np.uint16)
    positions, learnt = np.zeros_like(ids), np.zeros(ids.shape, dtype=np.bool_)
    for row, members in enumerate(plan):
        start = 0
        for chat in (chats[member] for member in members):
            stop = start + len(chat.ids)
            ids[row, start:stop], learnt[row, start:stop] = chat
            positions[row, start:stop] = np.arange(len(chat.ids))
            start = stop
    return ChatRows(ids, positions, learnt)


def chat_batch(rows: ChatRows) -> dict[str, Tensor]:
    """Rows as `input_ids`, `position_ids` and `labels`, `(B, T)`."""
    input_ids = torch.from_numpy(rows.ids.astype(np.int64))
    return {
        "input_ids": input_ids,
        "position_ids": torch.from_numpy(rows.positions.astype(np.int64)),
        "labels": input_ids.masked_fill(torch.from_numpy(~rows.learnt), IGNORED),
    }


def _size(chats: Mapping[int, Encoded]) -> dict[str, int]:
    return {"documents": len(chats), "tokens": sum(len(chat.ids) for chat in chats.values())}


def _prompt(conversation: Conversation) -> list[Message]:
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")]
