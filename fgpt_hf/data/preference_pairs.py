"""Read preference pairs: rows in any usual column layout become a prompt with a chosen and a rejected reply.

`chosen` and `rejected` hold replies to `prompt` (TRL), to `instruction` and `input` (Raschka), to `question` or to
`conversations`, or whole conversations that differ in the last message only (UltraFeedback). A pair is held out by a
hash of its prompt: no prompt is in both splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.conversations import Message, hash_fraction_of, instruction_message, messages_in
from fgpt_hf.data.mixtures import DatasetRow, LoadedRows, MixtureRow, RowIssues, RowReader, local_samples, read_mixture
from fgpt_hf.data.sources import PREFERENCES
from fgpt_hf.errors import UserError

PROMPTS = ("prompt", "instruction", "question", "conversations", "messages")


@dataclass(frozen=True, kw_only=True)
class Pair(MixtureRow):
    """A prompt with the reply that was chosen and the one that was rejected."""

    prompt: Sequence[Message]
    chosen: str
    rejected: str

    @property
    def conversations(self) -> list[list[Message]]:
        """The prompt with the chosen reply, and with the rejected one."""
        return [[*self.prompt, {"role": "assistant", "content": reply}] for reply in (self.chosen, self.rejected)]


def load_pairs(run: PreferenceRun, issues: RowIssues) -> list[Pair]:
    """Return the pairs of `run.dataset_name`, which may be a mixture; malformed rows are added to `issues`.

    Raises:
        UserError: a dataset cannot be opened, or its columns hold no pairs; a malformed row is refused.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pairs.json")
        >>> _ = path.write_text(json.dumps([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}]))
        >>> (pair,) = load_pairs(PreferenceRun(dataset_name=str(path)), RowIssues())
        >>> pair.chosen, pair.rejected
        ('4', '5')
    """
    return read_mixture(run, PREFERENCES, _open_reader, issues)


def describe_pair_columns(run: PreferenceRun) -> str:
    """Return a line on the columns that each dataset on this machine has its pairs in.

    Raises:
        UserError: there are no such files, or their columns hold no pairs.
    """
    lines = []
    for name, rows in local_samples(run, PREFERENCES):
        _open_reader(name, rows)
        used = " or ".join(dict.fromkeys(map(_prompt_columns, rows)))
        lines.append(f"{name}: replies are read from chosen and rejected, their prompt from {used}")
    return "\n".join(lines)


def _prompt_columns(row: DatasetRow) -> str:
    """Return where the messages before a row's replies stand."""
    chosen = row.get("chosen")
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) and chosen[0].get("role") != "assistant":
        return "the messages before them"
    column = _prompt_column(row)
    return "instruction and input" if column == "instruction" and row.get("input") else column


def _open_reader(name: str, rows: LoadedRows) -> tuple[LoadedRows, RowReader[Pair]]:
    columns = set(rows.column_names)
    as_text = any(isinstance(row.get("chosen"), str) for row in rows.select(range(min(1, len(rows)))))
    if not {"chosen", "rejected"} <= columns or (as_text and not columns & set(PROMPTS)):
        raise UserError(
            f"{name} has the columns {', '.join(rows.column_names)}; pairs are in chosen and rejected, which are "
            "replies to prompt, to question, or to instruction and input, or whole conversations in messages"
        )
    return rows, _read_pair


def _read_pair(row: DatasetRow, row_id: str, repeats: float) -> Pair:
    chosen, rejected = (_conversation(row, column) for column in ("chosen", "rejected"))
    prompt = chosen[:-1]
    if prompt != rejected[:-1] or not prompt:
        raise UserError("'chosen' and 'rejected' are not replies to the same messages")
    replies = []
    for column, last in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if last["role"] != "assistant" or not isinstance(last["content"], str) or not last["content"].strip():
            raise UserError(f"{column!r} does not end in a reply of the assistant")
        replies.append(last["content"])
    if replies[0] == replies[1]:
        raise UserError("'chosen' equals 'rejected'")
    return Pair(
        prompt=prompt,
        chosen=replies[0],
        rejected=replies[1],
        row_id=row_id,
        hash_fraction=hash_fraction_of(row, prompt),
        repeats=repeats,
        is_derived="document_hash" in row,
    )


def _conversation(row: DatasetRow, column: str) -> list[Message]:
    """Return all messages up to a reply, which the column holds alone or with the messages before it."""
    messages = messages_in(row, column, "assistant")
    before = _prompt(row) if messages[0].get("role") == "assistant" else []
    return [{"role": message.get("role"), "content": message.get("content")} for message in [*before, *messages]]


def _prompt(row: DatasetRow) -> list[Message]:
    column = _prompt_column(row)
    return [instruction_message(row)] if column == "instruction" else messages_in(row, column, "user")


def _prompt_column(row: DatasetRow) -> str:
    return next((name for name in PROMPTS if row.get(name)), PROMPTS[0])
