"""Load what an instruction run trains on: conversations, tokenized, cut and packed into rows.

Every conversation is complete in one row, with positions of its own, so that attention never crosses from one to
another. No token is lost but those beyond `max_length`, which are reported. Short conversations in rows of 256 leave
0.4 % padding, and give 1.4 to 2.8 times as many reply tokens a second as batches padded to their longest conversation
(docs/benchmarks.md). A token takes 7 bytes of memory, or 9 of a vocabulary of more than 65,536.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data.batch_fields import DOCUMENT_ENDS, IGNORED, document_ends
from fgpt_hf.data.batches import Batches, ShuffledRows, arrays_fingerprint, at_row_end
from fgpt_hf.data.conversations import Conversation, Message, load_conversations
from fgpt_hf.data.mixtures import RowIssues, split_rows
from fgpt_hf.data.packing import assign_to_fewest_rows
from fgpt_hf.data.sources import DataProvenance
from fgpt_hf.data.splits import NOTHING_HELD_OUT, TRAIN, VALIDATION, SplitSize
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.tokenizer.fast_encoding import UNMARKED, EncodedConversation, encode_conversations
from fgpt_hf.wording import count_of


@dataclass(frozen=True)
class ChatRows:
    """Packed conversations.

    Attributes:
        ids: the tokens, `(N, T)`, padding after the last conversation.
        positions: each token's position in its conversation, `(N, T)`; 0 for padding, so that all of it stands alone.
        loss_mask: which tokens are scored, `(N, T)`.
        padding: how many tokens of them all are padding.
    """

    ids: Ids
    positions: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.bool_]
    padding: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, indices: Any) -> "ChatRows":
        return ChatRows(self.ids[indices], self.positions[indices], self.loss_mask[indices])

    @property
    def fingerprint(self) -> str:
        """A hash of ids, positions and mask."""
        return arrays_fingerprint(self.ids, self.positions, self.loss_mask)

    def __str__(self) -> str:
        return (
            f"{count_of(len(self), 'row')} of {self.ids.shape[1]} tokens, {self.loss_mask.sum():,} of them scored, "
            f"{self.padding / max(1, self.ids.size):.2%} padding"
        )


@dataclass(frozen=True)
class InstructData:
    """What an instruction run reads.

    Attributes:
        rows: what is trained on, as often as an epoch has it.
        validation: what is held out.
        prompts: the beginnings of held-out conversations, up to the assistant's first reply.
        description: a line on the data, and one for each issue with some of its rows.
        provenance: what is known of the data, for a model card.
        collate: makes rows a batch.
    """

    rows: ChatRows
    validation: ChatRows
    prompts: list[list[Message]]
    description: str
    provenance: DataProvenance
    collate: Callable[[ChatRows], dict[str, Tensor]]

    def batches(self, seed: int, rank: int, processes: int) -> Batches:
        """Return the batches of a process."""
        return ShuffledRows(self.rows, seed, rank, processes, self.collate)


def load_instruct_data(
    run: InstructRun,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    encoder: DocumentEncoder = PROJECT_ENCODER,
) -> InstructData:
    """Return the conversations of `run.dataset_name` in rows of `run.max_length` tokens, or of the whole `context`.

    Args:
        encoder: the tokenizer's, which says how rows are padded, and whether they hold several conversations.

    Raises:
        UserError: the data cannot be opened, a row of it is refused, a split is empty, or `max_length` is more than
            the context.
    """
    length = run.sequence_length(context)
    issues = RowIssues()
    encoded = encode_chats(tokenizer, load_conversations(run, issues), issues, length, run)
    train, validation = split_rows(encoded, run, "conversations", issues)
    rows = pack_chats(
        [chat for conversation, chat in train for _ in range(conversation.times_an_epoch)], length, encoder
    )
    description = f"{run.dataset_name}: {count_of(len(train), 'conversation')} in {rows}; {len(validation):,} held out"
    nothing_held_out = "" if validation else NOTHING_HELD_OUT
    return InstructData(
        rows,
        pack_chats([chat for _, chat in validation], length, encoder)[: run.max_eval_rows],
        [_prompt(conversation) for conversation, _ in validation[: run.validation_prompts]],
        "\n".join(filter(None, [description, nothing_held_out, str(issues)])),
        DataProvenance({TRAIN: _size(train), VALIDATION: _size(validation)}),
        partial(chat_batch, encoder=encoder),
    )


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    issues: RowIssues,
    length: int,
    run: InstructRun,
) -> list[tuple[Conversation, EncodedConversation]]:
    """Return the conversations with their ids, cut to `length`, and the mask of the tokens to score.

    Conversations that cannot be trained on, and those that are cut, are added to `issues`.

    Raises:
        UserError: the run refuses such conversations.
    """
    found = []
    chats = [conversation.messages for conversation in conversations]
    encoded = encode_conversations(tokenizer, chats, needs_mask=run.assistant_only_loss)
    for conversation, chat in zip(conversations, encoded, strict=True):
        if isinstance(chat, ValueError):
            issues.add(conversation.row_id, str(chat), run.bad_rows)
            continue
        if run.assistant_only_loss and not chat.loss_mask.any():
            issues.add(conversation.row_id, UNMARKED, run.bad_rows)
            continue
        if len(chat.ids) > length and chat.loss_mask.any() and not chat.loss_mask[:length].any():
            issues.add(conversation.row_id, f"its prompt alone is longer than {length} tokens", run.bad_rows)
            continue
        if len(chat.ids) > length:
            issues.add(conversation.row_id, f"it is longer than {length} tokens", run.long_rows)
            if run.long_rows == "skip":
                continue
        loss_mask = chat.loss_mask if run.assistant_only_loss else np.arange(len(chat.ids)) > 0
        found.append((conversation, EncodedConversation(chat.ids[:length], loss_mask[:length])))
    return found


def pack_chats(
    chats: Sequence[EncodedConversation], length: int, encoder: DocumentEncoder = PROJECT_ENCODER
) -> ChatRows:
    """Pack conversations into rows of `length` tokens, each complete in one of them, or in one of its own.

    Example:
        >>> chats = [EncodedConversation(np.arange(n, dtype=np.uint16), np.arange(n) > 1) for n in (3, 4)]
        >>> pack_chats(chats, length=8).positions.tolist()
        [[0, 1, 2, 3, 0, 1, 2, 0]]
    """
    lengths = [len(chat.ids) for chat in chats]
    plan = assign_to_fewest_rows(lengths, length) if encoder.packs else [[index] for index in range(len(chats))]
    ids: Ids = np.full((len(plan), length), encoder.pad, dtype=encoder.dtype)
    positions, loss_mask = np.zeros(ids.shape, dtype=np.uint32), np.zeros(ids.shape, dtype=np.bool_)
    for row, members in enumerate(plan):
        start = 0
        for chat in (chats[member] for member in members):
            stop = start + len(chat.ids)
            ids[row, start:stop], loss_mask[row, start:stop] = chat
            positions[row, start:stop] = np.arange(len(chat.ids))
            start = stop
    return ChatRows(ids, positions, loss_mask, ids.size - sum(lengths))


def chat_batch(rows: ChatRows, encoder: DocumentEncoder = PROJECT_ENCODER) -> dict[str, Tensor]:
    """Return rows as `input_ids` and `labels`, each `(B, T)`; packed ones with `position_ids` and `document_ends`."""
    input_ids = torch.from_numpy(rows.ids.astype(np.int64))
    labels = input_ids.masked_fill(torch.from_numpy(~rows.loss_mask), IGNORED)
    batch = {"input_ids": input_ids, "labels": labels}
    if encoder.packs:
        position_ids = torch.from_numpy(rows.positions.astype(np.int64))
        is_padding = at_row_end((input_ids == encoder.pad) & (position_ids == 0))
        batch |= {"position_ids": position_ids, DOCUMENT_ENDS: document_ends(position_ids, is_padding)}
    return batch


def _size(chats: Sequence[tuple[Conversation, EncodedConversation]]) -> SplitSize:
    return SplitSize(documents=len(chats), tokens=sum(len(chat.ids) for _, chat in chats))


def _prompt(conversation: Conversation) -> list[Message]:
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")]
