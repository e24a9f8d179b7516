"""Read conversations: rows in any usual column layout become lists of messages.

Known layouts are `messages`, as most chat datasets have it; `conversations`, with `from` and `value`, as ShareGPT has
it; `prompt` and `completion`, each text or messages, as TRL has it; `instruction`, `input` and `output`, as Alpaca has
it; and `question` and `answer`. Each row may have another one of them. Of a tree of replies (OpenAssistant) the best
ranked ones are followed. The order of roles is not checked here: the chat template refuses a wrong one.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset

from fgpt_hf.config.runs import TuningRun
from fgpt_hf.data.mixtures import DatasetRow, LoadedRows, MixtureRow, RowIssues, RowReader, local_samples, read_mixture
from fgpt_hf.data.sources import CONVERSATIONS
from fgpt_hf.data.splits import document_hash
from fgpt_hf.errors import UserError

Message: TypeAlias = dict[str, Any]  # role and content
Layout: TypeAlias = tuple[str, ...]  # the columns that make a conversation

ROLES = {  # as other datasets call them
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "model", "ai"), "assistant"),
}


@dataclass(frozen=True, kw_only=True)
class Conversation(MixtureRow):
    """The messages of a row, one of them at least the assistant's."""

    messages: list[Message]


def load_conversations(run: TuningRun, issues: RowIssues) -> list[Conversation]:
    """Return the conversations of `run.dataset_name`, which may be a mixture; malformed rows are added to `issues`.

    Raises:
        UserError: a dataset cannot be opened, or its columns hold no conversations; a malformed row is refused.

    Example:
        >>> import json, pathlib, tempfile
        >>> from fgpt_hf.config.runs import InstructRun
        >>> path = pathlib.Path(tempfile.mkdtemp(), "chats.json")
        >>> _ = path.write_text(json.dumps([{"prompt": "2 + 2?", "completion": "4"}]))
        >>> (conversation,) = load_conversations(InstructRun(dataset_name=str(path)), RowIssues())
        >>> conversation.messages
        [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """

    def open_reader(name: str, rows: LoadedRows) -> tuple[LoadedRows, RowReader[Conversation]]:
        if isinstance(rows, Dataset) and name in TREES:
            rows = TREES[name](rows)
        layouts = _layouts(name, rows.column_names)

        def read(row: DatasetRow, row_id: str, repeats: float) -> Conversation:
            messages = _checked(_messages_of(row, layouts))
            fraction = hash_fraction_of(row, messages)
            derived = "document_hash" in row
            return Conversation(
                messages=messages, row_id=row_id, hash_fraction=fraction, repeats=repeats, is_derived=derived
            )

        return rows, read

    return read_mixture(run, CONVERSATIONS, open_reader, issues)


def describe_layouts(run: TuningRun) -> str:
    """Return a line on the columns that each dataset on this machine has its conversations in.

    Raises:
        UserError: there are no such files, or their columns hold no conversations.
    """
    lines = []
    for name, rows in local_samples(run, CONVERSATIONS):
        layouts = _layouts(name, rows.column_names)
        used = dict.fromkeys(" and ".join(_layout_of(row, layouts)) for row in rows)
        lines.append(f"{name}: conversations are read from {'; '.join(used)}")
    return "\n".join(lines)


# What rows of conversations and of pairs have in common


def instruction_message(row: DatasetRow) -> Message:
    """Return Alpaca's prompt: the instruction, then a line end and the input, or the context, if there is one."""
    instruction, given = filled_column(row, "instruction"), row.get("input") or row.get("context") or ""
    if not isinstance(instruction, str) or not isinstance(given, str):
        raise UserError("'instruction' or 'input' is not text")
    return {"role": "user", "content": instruction + (f"\n{given}" if given.strip() else "")}


def filled_column(row: DatasetRow, column: str) -> Any:
    """Return the value in a column; UserError if it is missing or empty."""
    value = row.get(column)
    if not (value.strip() if isinstance(value, str) else value):
        raise UserError(f"{column!r} is missing or empty")
    return value


def messages_in(row: DatasetRow, column: str, role: str) -> list[Message]:
    """Return the messages in a column, where text alone is one message of `role`; UserError if there is none."""
    content = filled_column(row, column)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    content = [content] if isinstance(content, dict) else content
    if not (isinstance(content, list) and all(isinstance(message, dict) for message in content)):
        raise UserError(f"{column!r} is neither text nor messages with role and content")
    return [_usual_message(message) for message in content]


def _usual_message(message: Message) -> Message:
    """Return a message with role and content; ShareGPT has `from` and `value`, and many have names for the roles."""
    if "from" in message and "role" not in message:
        message = {"role": message["from"], "content": message.get("value")}
    role = message.get("role")
    return message | {"role": ROLES.get(role.lower(), role)} if isinstance(role, str) else message


def hash_fraction_of(row: DatasetRow, messages: Sequence[Message]) -> float:
    """Return the hash of the document that a row was made from, if it has that, or else of all messages."""
    if isinstance(fraction := row.get("document_hash"), float):
        return fraction
    return document_hash("\n".join(f"{message.get('role')}\n{message['content']}" for message in messages))


# Layouts


def _layouts(name: str, columns: Sequence[str]) -> list[Layout]:
    """Return the layouts that rows with these columns may have."""
    layouts = [needed for needed in LAYOUTS if set(needed) <= set(columns)]
    if layouts:
        return layouts
    raise UserError(
        f"{name} has the columns {', '.join(columns)}; conversations are in a column messages or conversations, in "
        "prompt and completion, in instruction, input and output, or in question and answer"
    )


def _layout_of(row: DatasetRow, layouts: Sequence[Layout]) -> Layout:
    """Return the first layout whose columns the row fills, or else the first of all."""
    return next((needed for needed in layouts if all(row.get(column) for column in needed)), layouts[0])


def _messages_of(row: DatasetRow, layouts: Sequence[Layout]) -> list[Message]:
    """Return the messages of a row, after its system prompt if a column of its own holds that."""
    needed = _layout_of(row, layouts)
    messages = LAYOUTS[needed](row, *needed)
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system.strip() and messages and messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _from_messages(row: DatasetRow, column: str) -> list[Message]:
    """Return the messages, without a system message that is empty."""
    messages = messages_in(row, column, "user") if row[column] else []
    if messages and messages[0].get("role") == "system" and not messages[0].get("content"):
        return messages[1:]
    return messages


def _from_completion(row: DatasetRow, prompt: str, completion: str) -> list[Message]:
    return [*messages_in(row, prompt, "user"), *messages_in(row, completion, "assistant")]


def _from_instruction(row: DatasetRow, _: str, output: str) -> list[Message]:
    return [instruction_message(row), {"role": "assistant", "content": filled_column(row, output)}]


LAYOUTS: Mapping[Layout, Callable[..., list[Message]]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_messages,
    ("conversation",): _from_messages,
    ("prompt", "completion"): _from_completion,
    ("prompt", "response"): _from_completion,
    ("instruction", "output"): _from_instruction,
    ("instruction", "response"): _from_instruction,
    ("question", "answer"): _from_completion,
    ("question", "response"): _from_completion,
}


def _checked(messages: list[Message]) -> list[Message]:
    """Return the messages; UserError if one is empty or none is the assistant's."""
    for number, message in enumerate(messages, start=1):
        if "content" not in message:
            raise UserError(f"message {number} has {', '.join(message)} instead of role and content")
        content = message["content"]
        if not (content.strip() if isinstance(content, str) else content):
            raise UserError(f"message {number} is missing or empty")
    roles = dict.fromkeys(str(message.get("role")) for message in messages)
    if "assistant" not in roles:
        names = ", ".join(roles)
        raise UserError(f"no message is the assistant's{f', only of {names}' if roles else ''}")
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
