"""The benchmarks by name: where a task's rows are, how a row is rendered, and what is asked of the model.

Texts, splits and labels are those of lm-evaluation-harness 0.4.13's tasks of the same names. An ending is scored behind
a space, as there, and measured without it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from fgpt_hf.data.corpora import document_hash
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.pydocs_derived import VALIDATION_FRACTION, load_pydocs_choice
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.fast_encoding import well_formed

Fields = Mapping[str, Any]

LETTERS = "ABCDE"


class Example(NamedTuple):
    """Endings, each of the context at its place, and the number of the right one; most tasks repeat one context."""

    contexts: Sequence[str]
    endings: Sequence[str]
    label: int
    delimiter: str = " "  # scored with an ending, and not counted in its length

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is scored: (context, delimiter and ending)."""
        return [(context, self.delimiter + ending) for context, ending in zip(self.contexts, self.endings, strict=True)]


class HubSource(NamedTuple):
    """A data set on the Hub, and the split that is evaluated."""

    path: str
    configuration: str | None
    split: str


class Task(NamedTuple):
    """One benchmark.

    Attributes:
        kind: how it is asked: the likeliest `choice`; the `last_word` of a text; the `letter` of a choice, written by
            the model; a whole `text`, for its bits per byte.
        source: where the rows are unless a file is given.
        render: a row, with the tokenizer whose chat template it may need, as an example.
        metric: the number by which the task is known.
    """

    kind: Literal["choice", "last_word", "letter", "text"]
    source: HubSource | Callable[[], Sequence[Fields]]
    render: Callable[[Fields, PreTrainedTokenizerBase], Example]
    metric: str


def find_task(name: str) -> Task:
    """The task of a name, such as `piqa`.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}; TASK=FILE takes the rows of a file")
    return TASKS[name]


def load_examples(
    name: str, tokenizer: PreTrainedTokenizerBase, file: str | None = None, limit: int | None = None
) -> list[Example]:
    """The first `limit` examples of a task, from its source or from a file: JSON lines with the source's fields.

    Raises:
        UserError: no such file, no examples, or one that lacks a field, has something else than text in it, a label
            out of range or an ending that is empty or (in a file) equal to another one.
        OSError: the Hub lacks the data set, or cannot be reached.
    """
    task = find_task(name)
    rows = _rows(task, file)
    count = len(rows) if limit is None else min(limit, len(rows))
    if not count:
        raise UserError(f"{name}: {'its source' if file is None else file} holds no examples")
    return [_rendered(f"{name}, example {number + 1}", task, rows[number], tokenizer, file) for number in range(count)]


def _rows(task: Task, file: str | None) -> Sequence[Fields]:
    if file is not None:
        return _read(Path(file), whole=task.kind == "text")
    if isinstance(task.source, HubSource):
        from datasets import load_dataset  # here, because it takes a second and local tasks do without

        return load_dataset(task.source.path, task.source.configuration, split=task.source.split)
    return task.source()


def _read(path: Path, whole: bool) -> Sequence[Fields]:
    """The objects of a JSON-lines file; with `whole`, any other file is one text."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        text = path.read_bytes().decode("utf-8")  # with the line ends that it has
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if whole and path.suffix not in (".jsonl", ".json"):
        return [{"text": text}] if text else []
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # other separators may stand inside JSON's strings
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not an object with fields")
        rows.append(row)
    return rows


def _rendered(place: str, task: Task, row: Fields, tokenizer: PreTrainedTokenizerBase, file: str | None) -> Example:
    try:
        example = task.render(well_formed(row), tokenizer)
    except KeyError as error:
        raise UserError(f"{place}: the field {error} is missing; it has {', '.join(row)}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from error
    for text in (*example.contexts, *example.endings):
        if not isinstance(text, str):
            raise UserError(f"{place}: {text!r} stands where a text must be")
    if not 0 <= example.label < len(example.endings):
        raise UserError(f"{place}: the label {example.label} is not one of 0 to {len(example.endings) - 1}")
    if not all(ending.strip() for ending in example.endings):
        raise UserError(f"{place}: an ending is empty")
    pairs = list(zip(example.contexts, example.endings, strict=True))
    if file is not None and len(set(pairs)) < len(pairs):  # published sets are scored as they are
        raise UserError(f"{place}: two endings are equal, so that neither can be right")
    return example


# How rows are rendered.


def _choice(context: str, endings: Sequence[str], label: int) -> Example:
    if isinstance(endings, str):
        raise TypeError(f"the endings must be a list of texts, not {endings[:40]!r}")
    return Example([context] * len(endings), list(endings), label)


def _hellaswag(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The harness' text; a file without the two halves of the context gives it whole, as `ctx`."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_b" in row else row["ctx"]
    endings = [_without_marks(ending) for ending in row["endings"]]
    return _choice(_without_marks(f"{row['activity_label']}: {context}"), endings, int(row["label"]))


def _hellaswag_plain(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The text of Karpathy's script and the original FGPT: neither the activity nor any cleaning."""
    return _choice(row["ctx"], row["endings"], int(row["label"]))


def _hellaswag_letters(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The harness' text as a user's question with lettered choices, of which the assistant names one."""
    contexts, endings, label, _ = _hellaswag(row, tokenizer)
    if not tokenizer.chat_template:
        raise UserError("this task asks a chat model, and the tokenizer has no chat template: try hellaswag")
    choices = "\n".join(f"{letter}. {ending}" for letter, ending in zip(LETTERS, endings, strict=False))
    question = f"Which ending continues the text best?\n\n{contexts[0]} …\n\n{choices}\n\nAnswer with the letter alone."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return _choice(str(prompt), list(LETTERS[: len(endings)]), label)._replace(delimiter="")


def _without_marks(text: str) -> str:
    """HellaSwag's WikiHow half without its marks in brackets, by the harness' rule."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lambada(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    *words, last = row["text"].split(" ")
    return _choice(" ".join(words), [last], 0)


def _piqa(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], _labelled(row))


def _openbookqa(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(row["question_stem"], row["choices"]["text"], _labelled(row))


def _commonsense_qa(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"]["text"], strict=True))
    return _choice(f"Question: {row['question'].strip()}\n{choices}\nAnswer:", list(LETTERS), _labelled(row))


def _labelled(row: Fields) -> int:
    return row["choices"]["label"].index(row["answerKey"].lstrip())


def _winogrande(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Two contexts, the gap filled with either option, and what follows the gap as the ending of both."""
    before, _, after = row["sentence"].partition("_")
    return Example([before + row["option1"], before + row["option2"]], [after.strip()] * 2, int(row["answer"]) - 1)


def _pydocs_choice(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(row["context"], row["endings"], int(row["label"]))


def _text(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice("", [row["text"]], 0)


def _validation_pydocs() -> Sequence[Fields]:
    documents = sorted((document_hash(text), text) for text in load_pydocs()["text"])
    return [{"text": text} for place, text in documents if place < VALIDATION_FRACTION]


_ARC, _HELLASWAG = "allenai/ai2_arc", HubSource("Rowan/hellaswag", None, "validation")

TASKS: Mapping[str, Task] = {
    "pydocs-choice": Task("choice", load_pydocs_choice, _pydocs_choice, "acc_norm"),
    "pydocs-validation": Task("text", _validation_pydocs, _text, "bits_per_byte"),
    "hellaswag": Task("choice", _HELLASWAG, _hellaswag, "acc_norm"),
    "hellaswag_plain": Task("choice", _HELLASWAG, _hellaswag_plain, "acc_token"),
    "hellaswag_letters": Task("choice", _HELLASWAG, _hellaswag_letters, "acc"),
    "hellaswag_generated": Task("letter", _HELLASWAG, _hellaswag_letters, "acc"),
    "lambada": Task("last_word", HubSource("EleutherAI/lambada_openai", "default", "test"), _lambada, "acc"),
    "piqa": Task("choice", HubSource("baber/piqa", None, "validation"), _piqa, "acc_norm"),
    "arc_easy": Task("choice", HubSource(_ARC, "ARC-Easy", "test"), _arc, "acc_norm"),
    "arc_challenge": Task("choice", HubSource(_ARC, "ARC-Challenge", "test"), _arc, "acc_norm"),
    "winogrande": Task("choice", HubSource("allenai/winogrande", "winogrande_xl", "validation"), _winogrande, "acc"),
    "openbookqa": Task("choice", HubSource("allenai/openbookqa", "main", "test"), _openbookqa, "acc_norm"),
    "commonsense_qa": Task("choice", HubSource("tau/commonsense_qa", None, "validation"), _commonsense_qa, "acc"),
}
