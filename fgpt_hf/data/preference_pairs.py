"""Which preference pairs: names become rows, rows become a prompt with two replies, a hash says which are held out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, Value

from fgpt_hf.config.runs import BadRows, PreferenceRun
from fgpt_hf.data.conversations import Message, RowIssues, instruction, place_of, rows_of, said
from fgpt_hf.data.pydocs_derived import load_pydocs_preference
from fgpt_hf.data.sources import DatasetRegistry, MixtureEntry, open_rows, parse_mixture
from fgpt_hf.errors import UserError

NAMES = DatasetRegistry(
    "preference data",
    embedded={"pydocs-preference": load_pydocs_preference},
    files={
        "rasbt-preference": "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
        "04_preference-tuning-with-dpo/instruction-data-with-preference.json"
    },
)


class Pair(NamedTuple):
    """A prompt with the reply that was chosen and the one that was not, and where they come from.

    `place`, in [0, 1), says whether the pair is held out: it is a hash of the prompt, so that none is in both splits.
    """

    prompt: Sequence[Message]
    chosen: str
    rejected: str
    origin: str
    place: float
    times: float = 1.0

    @property
    def conversations(self) -> list[list[Message]]:
        """The prompt with the chosen reply, and with the rejected one."""
        return [[*self.prompt, {"role": "assistant", "content": reply}] for reply in (self.chosen, self.rejected)]


def load_pairs(run: PreferenceRun, flaws: RowIssues) -> list[Pair]:
    """The pairs of `run.dataset_name`, which may be a mixture; rows that are none go to `flaws`.

    Raises:
        UserError: a name that cannot be opened, or whose columns hold no pairs; a row that is to be refused.
    """
    return [
        pair
        for share in parse_mixture(run.dataset_name)
        for pair in _pairs(share, _open(share, run), flaws, run.bad_rows)
    ]


def _open(share: MixtureEntry, run: PreferenceRun) -> Dataset:
    rows = open_rows(NAMES, share.name, run.dataset_train_split, run.dataset_config_name, run.dataset_revision)
    columns = set(rows.column_names)
    as_text = "chosen" in columns and isinstance(rows.features["chosen"], Value)
    if not {"chosen", "rejected"} <= columns or (as_text and not columns & {"prompt", "instruction"}):
        raise UserError(
            f"{share.name} has the columns {', '.join(rows.column_names)}; pairs are in chosen and rejected, which are "
            "replies to prompt, or to instruction and input, or whole conversations in messages"
        )
    return rows


def _pairs(share: MixtureEntry, rows: Dataset, flaws: RowIssues, treatment: BadRows) -> Iterator[Pair]:
    numbers = rows_of(share, len(rows))
    for number, row in zip(numbers, rows.select(numbers), strict=True):
        origin = f"row {number} of {share.name}"
        try:
            prompt, chosen, rejected = _parted(row)
        except ValueError as error:
            flaws.note(origin, str(error), treatment)
            continue
        yield Pair(prompt, chosen, rejected, origin, place_of(row, prompt), share.times)


def _parted(row: Mapping[str, Any]) -> tuple[list[Message], str, str]:
    """The prompt and the two replies of a row."""
    chosen, rejected = (_conversation(row, name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        raise UserError("'chosen' and 'rejected' are not replies to the same messages")
    replies = []
    for name, last in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if last["role"] != "assistant" or not isinstance(last["content"], str) or not last["content"].strip():
            raise UserError(f"{name!r} does not end in a reply of the assistant")
        replies.append(last["content"])
    if replies[0] == replies[1]:
        raise UserError("'chosen' equals 'rejected'")
    return chosen[:-1], replies[0], replies[1]


def _conversation(row: Mapping[str, Any], name: str) -> list[Message]:
    """All messages up to a reply, which the column holds alone or with the messages before it."""
    messages = said(row, name, "assistant")
    before = _prompt(row) if messages[0].get("role") == "assistant" else []
    return [{"role": message.get("role"), "content": message.get("content")} for message in [*before, *messages]]


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if "prompt" not in row:
        return [instruction(row)]
    return said(row, "prompt", "user")
