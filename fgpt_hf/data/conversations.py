"""Which conversations: names become rows, rows become messages, and a hash says which of them are held out."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from fgpt_hf.config.runs import BadRows, LongRows, TuningRun
from fgpt_hf.data.corpora import document_hash
from fgpt_hf.data.pydocs_derived import load_pydocs_chat
from fgpt_hf.data.sources import DatasetRegistry, MixtureEntry, open_rows, parse_mixture
from fgpt_hf.errors import UserError

Message = dict[str, Any]

NAMES = DatasetRegistry(
    "conversations",
    embedded={"pydocs-chat": load_pydocs_chat},
    on_hub={
        "smol-smoltalk": ("HuggingFaceTB/smol-smoltalk", None),
        "alpaca-cleaned": ("yahma/alpaca-cleaned", None),
        "oasst1": ("OpenAssistant/oasst1", None),
    },
    files={
        "rasbt-instruct": "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/"
        "instruction-data.json"
    },
)
SHOWN = 5  # rows that are named for each thing that is wrong with some


class Conversation(NamedTuple):
    """What was said, where it is from, its place in [0, 1) by which it is held out, and how often an epoch has it."""

    messages: list[Message]
    origin: str
    place: float
    times: float = 1.0


class RowIssues:
    """The rows that are not as they should be, by what was done with them and why."""

    def __init__(self) -> None:
        self.origins: dict[tuple[str, str], list[str]] = defaultdict(list)

    def note(self, origin: str, reason: str, treatment: BadRows | LongRows) -> None:
        """Raises UserError where such rows are to be refused."""
        if treatment == "refuse":
            raise UserError(f"{origin}: {reason}")
        self.origins[{"skip": "left out", "cut": "cut"}[treatment], reason].append(origin)

    def __len__(self) -> int:
        return sum(map(len, self.origins.values()))

    def __str__(self) -> str:
        """A line for each reason, which counts its rows and names the first ones."""
        return "\n".join(
            f"{len(origins):,} {done}, {reason}: {', '.join(origins[:SHOWN])}{', …' if len(origins) > SHOWN else ''}"
            for (done, reason), origins in self.origins.items()
        )


def load_conversations(run: TuningRun, flaws: RowIssues) -> list[Conversation]:
    """The conversations of `run.dataset_name`, which may be a mixture; rows that are none go to `flaws`.

    Raises:
        UserError: a name that cannot be opened, or whose columns hold no conversations; a row that is to be refused.
    """
    return [
        conversation
        for share in parse_mixture(run.dataset_name)
        for conversation in _conversations(share, _open(share, run), flaws, run.bad_rows)
    ]


def rows_of(share: MixtureEntry, count: int) -> Sequence[int]:
    """The numbers of a data set's rows that a mixture takes: all, or a random choice that is always the same."""
    if share.most is None or share.most >= count:
        return range(count)
    return np.sort(np.random.default_rng(0).permutation(count)[: share.most]).tolist()


def times_an_epoch(origin: str, times: float) -> int:
    """How often an epoch has a row: of 2.5 times, three for half of the rows and two for the others."""
    whole = math.floor(times)
    return whole + (document_hash(origin) < times - whole)


def instruction(row: Mapping[str, Any]) -> Message:
    """The original's prompt: the instruction, then a new line and the input where there is one."""
    given = row.get("input") or ""
    return {"role": "user", "content": filled(row, "instruction") + (f"\n{given}" if given.strip() else "")}


def filled(row: Mapping[str, Any], name: str) -> Any:
    """What a row has under a name; UserError where that is nothing."""
    if not (row[name].strip() if isinstance(row[name], str) else row[name]):
        raise UserError(f"{name!r} is missing or empty")
    return row[name]


def said(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """The messages that a row has under a name, of which text alone is one; UserError where it has none."""
    content = filled(row, name)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not (isinstance(content, list) and all(isinstance(message, dict) for message in content)):
        raise UserError(f"{name!r} is neither text nor messages with role and content")
    return content


def place_of(row: Mapping[str, Any], messages: Sequence[Message]) -> float:
    """A hash of all that is said, or of the document that the row was made of, so that both are held out together."""
    if isinstance(place := row.get("document_hash"), float):
        return place
    return document_hash("\n".join(f"{message.get('role')}\n{message['content']}" for message in messages))


def _open(share: MixtureEntry, run: TuningRun) -> Dataset:
    rows = open_rows(NAMES, share.name, run.dataset_train_split, run.dataset_config_name, run.dataset_revision)
    return TREES[share.name](rows) if share.name in TREES else rows


def _conversations(share: MixtureEntry, rows: Dataset, flaws: RowIssues, treatment: BadRows) -> Iterator[Conversation]:
    read = _reader(share.name, rows.column_names)
    numbers = rows_of(share, len(rows))
    for number, row in zip(numbers, rows.select(numbers), strict=True):
        origin = f"row {number} of {share.name}"
        try:
            messages = _checked(read(row))
        except ValueError as error:
            flaws.note(origin, str(error), treatment)
            continue
        yield Conversation(messages, origin, place_of(row, messages), share.times)


def _reader(name: str, columns: Sequence[str]) -> Callable[[Mapping[str, Any]], list[Message]]:
    """How a row of such columns becomes messages."""
    for needed, read in FORMS.items():
        if set(needed) <= set(columns):
            return read
    raise UserError(
        f"{name} has the columns {', '.join(columns)}; conversations are in a column messages, in prompt and "
        "completion, or in instruction, input and output"
    )


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    """The messages as they are, without a system message that says nothing."""
    messages = said(row, "messages", "user") if row["messages"] else []
    if messages and messages[0].get("role") == "system" and not messages[0].get("content"):
        return messages[1:]
    return messages


def _from_completion(row: Mapping[str, Any]) -> list[Message]:
    """A prompt and its completion, each text or messages, as in TRL."""
    return [*said(row, "prompt", "user"), *said(row, "completion", "assistant")]


def _from_instruction(row: Mapping[str, Any]) -> list[Message]:
    return [instruction(row), {"role": "assistant", "content": filled(row, "output")}]


FORMS: Mapping[tuple[str, ...], Callable[[Mapping[str, Any]], list[Message]]] = {
    ("messages",): _from_messages,
    ("prompt", "completion"): _from_completion,
    ("instruction", "output"): _from_instruction,
}


def _checked(messages: list[Message]) -> list[Message]:
    """Raise UserError where a message is empty or none is the assistant's; roles are the chat template's affair."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if not (content.strip() if isinstance(content, str) else content):
            raise UserError(f"message {number} is missing or empty")
    if not any(message.get("role") == "assistant" for message in messages):
        raise UserError("no message is the assistant's")
    return messages


def best_paths(rows: Dataset) -> Dataset:
    """A conversation for each tree of `OpenAssistant/oasst1`: from its prompt on, always the reply ranked best."""
    replies: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
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
