"""Read conversations: rows in any usual column layout become lists of messages.

Three layouts are known: `messages`, as most chat data sets have it; `prompt` and `completion`, each text or messages,
as TRL has it; and `instruction`, `input` and `output`, as Alpaca has it. Of a tree of replies (OpenAssistant) the best
ranked ones are followed. Roles are not checked here: the chat template refuses a wrong order.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset

from fgpt_hf.config.runs import TuningRun
from fgpt_hf.data.mixtures import DatasetRow, MixtureRow, RowIssues, RowReader, read_mixture
from fgpt_hf.data.sources import CONVERSATIONS
from fgpt_hf.data.splits import document_hash
from fgpt_hf.errors import UserError

Message: TypeAlias = dict[str, Any]  # role and content


@dataclass(frozen=True, kw_only=True)
class Conversation(MixtureRow):
    """The messages of a row, one of them at least the assistant's."""

    messages: list[Message]


def load_conversations(run: TuningRun, issues: RowIssues) -> list[Conversation]:
    """Return the conversations of `run.dataset_name`, which may be a mixture; malformed rows are added to `issues`.

    Raises:
        UserError: a data set cannot be opened, or its columns hold no conversations; a malformed row is refused.

    Example:
        >>> import json, pathlib, tempfile
        >>> from fgpt_hf.config.runs import InstructRun
        >>> path = pathlib.Path(tempfile.mkdtemp(), "chats.json")
        >>> _ = path.write_text(json.dumps([{"prompt": "2 + 2?", "completion": "4"}]))
        >>> (conversation,) = load_conversations(InstructRun(dataset_name=str(path)), RowIssues())
        >>> conversation.messages
        [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """

    def open_reader(name: str, rows: Dataset) -> tuple[Dataset, RowReader[Conversation]]:
        rows = TREES[name](rows) if name in TREES else rows
        messages_of = _layout(name, rows.column_names)

        def read(row: DatasetRow, row_id: str, repeats: float) -> Conversation:
            messages = _checked(messages_of(row))
            fraction = hash_fraction_of(row, messages)
            return Conversation(messages=messages, row_id=row_id, hash_fraction=fraction, repeats=repeats)

        return rows, read

    return read_mixture(run, CONVERSATIONS, open_reader, issues)


# What rows of conversations and of pairs have in common


def instruction_message(row: DatasetRow) -> Message:
    """Return Alpaca's prompt: the instruction, then a line end and the input if there is one."""
    instruction, given = filled_column(row, "instruction"), row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(given, str):
        raise UserError("'instruction' or 'input' is not text")
    return {"role": "user", "content": instruction + (f"\n{given}" if given.strip() else "")}


def filled_column(row: DatasetRow, column: str) -> Any:
    """Return the value in a column; UserError if it is missing or empty."""
    if not (row[column].strip() if isinstance(row[column], str) else row[column]):
        raise UserError(f"{column!r} is missing or empty")
    return row[column]


def messages_in(row: DatasetRow, column: str, role: str) -> list[Message]:
    """Return the messages in a column, where text alone is one message of `role`; UserError if there is none."""
    content = filled_column(row, column)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not (isinstance(content, list) and all(isinstance(message, dict) for message in content)):
        raise UserError(f"{column!r} is neither text nor messages with role and content")
    return content


def hash_fraction_of(row: DatasetRow, messages: Sequence[Message]) -> float:
    """Return the hash of the document that a row was made of, if it has that, or else of all messages."""
    if isinstance(fraction := row.get("document_hash"), float):
        return fraction
    return document_hash("\n".join(f"{message.get('role')}\n{message['content']}" for message in messages))


# Layouts


def _layout(name: str, columns: Sequence[str]) -> Callable[[DatasetRow], list[Message]]:
    """Return the function that turns a row with these columns into messages."""
    for needed, messages_of in LAYOUTS.items():
        if set(needed) <= set(columns):
            return messages_of
    raise UserError(
        f"{name} has the columns {', '.join(columns)}; conversations are in a column messages, in prompt and "
        "completion, or in instruction, input and output"
    )


def _from_messages(row: DatasetRow) -> list[Message]:
    """Return the messages, without a system message that is empty."""
    messages = messages_in(row, "messages", "user") if row["messages"] else []
    if messages and messages[0].get("role") == "system" and not messages[0].get("content"):
        return messages[1:]
    return messages


def _from_completion(row: DatasetRow) -> list[Message]:
    return [*messages_in(row, "prompt", "user"), *messages_in(row, "completion", "assistant")]


def _from_instruction(row: DatasetRow) -> list[Message]:
    return [instruction_message(row), {"role": "assistant", "content": filled_column(row, "output")}]


LAYOUTS: Mapping[tuple[str, ...], Callable[[DatasetRow], list[Message]]] = {
    ("messages",): _from_messages,
    ("prompt", "completion"): _from_completion,
    ("instruction", "output"): _from_instruction,
}


def _checked(messages: list[Message]) -> list[Message]:
    """Return the messages; UserError if one is empty or none is the assistant's."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if not (content.strip() if isinstance(content, str) else content):
            raise UserError(f"message {number} is missing or empty")
    if not any(message.get("role") == "assistant" for message in messages):
        raise UserError("no message is the assistant's")
    return messages


def best_paths(rows: Dataset) -> Dataset:
    """Return a conversation for each tree of `OpenAssistant/oasst1`: its prompt, and always the best ranked reply."""
    replies: dict[str | None, list[DatasetRow]] = defaultdict(list)
    for row in rows:
        if not row["deleted"]:
            replies[row["parent_id"]].append(row)
    roles = {"prompter": "user", "assistant": "assistant"}
    conversations = []
    for row in replies[None]:
        messages: list[Message] = []
        following = [row]
        while following:
            best = min(following, key=lambda reply: (reply["rank"] is None, reply["rank"] or 0))
            messages.append({"role": roles[best["role"]], "content": best["text"]})
            following = replies[best["message_id"]]
        conversations.append({"messages": messages})
    return Dataset.from_list(conversations)


TREES: Mapping[str, Callable[[Dataset], Dataset]] = {"oasst1": best_paths}
