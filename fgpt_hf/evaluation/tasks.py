"""Benchmark tasks by name: the source of their rows, the rendering of a row as text, and how a model is asked.

Texts, splits and labels are those of the tasks of the same names in lm-evaluation-harness 0.4.13. As there, an ending
is scored with a space before it, and its length is counted without.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from fgpt_hf.data.basic_qa import Question, first_questions, unseen_questions
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.pydocs_derived import VALIDATION_FRACTION, load_pydocs_choice
from fgpt_hf.data.splits import document_hash
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.parsing import parse_json
from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.surrogates import repair_surrogates

Fields = Mapping[str, Any]

LETTERS = "ABCDE"


class Example(NamedTuple):
    """A rendered example: endings, each with its context (mostly the same one), and the index of the right ending.

    Example:
        >>> Example(["2 + 2 ="] * 2, ["4", "5"], label=0).pairs
        [('2 + 2 =', ' 4'), ('2 + 2 =', ' 5')]
    """

    contexts: Sequence[str]
    endings: Sequence[str]
    label: int
    delimiter: str = " "  # scored with an ending but not counted in its length

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The texts to score: (context, delimiter + ending)."""
        return [(context, self.delimiter + ending) for context, ending in zip(self.contexts, self.endings, strict=True)]


class HubSource(NamedTuple):
    """A dataset on the Hub and the split to evaluate."""

    path: str
    configuration: str | None
    split: str


class Task(NamedTuple):
    """A benchmark task.

    Attributes:
        kind: `choice`, the likeliest ending wins; `last_word`, the last word of a text must be the likeliest; `letter`,
            the model writes the letter of a choice; `reply`, the model writes the whole reply; `text`, the bits per
            byte of whole texts.
        source: the rows to use unless a file is given.
        render: turns a row into an example; the tokenizer's chat template may be needed.
        headline_metric: the metric that the task is usually quoted by.
    """

    kind: Literal["choice", "last_word", "letter", "reply", "text"]
    source: HubSource | Callable[[], Sequence[Fields]]
    render: Callable[[Fields, PreTrainedTokenizerBase], Example]
    headline_metric: str


def find_task(name: str) -> Task:
    """Return the task of this name, such as `piqa`.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}; TASK=FILE takes the rows of a file")
    return TASKS[name]


def load_examples(
    name: str, tokenizer: PreTrainedTokenizerBase, file: str | None = None, limit: int | None = None
) -> list[Example]:
    """Load the examples of a task, at most `limit`, from its source or from a file.

    A file holds JSON lines with the fields of the source's rows. For tasks on whole texts, any other file is one text.

    Raises:
        UserError: the file is missing or the dataset cannot be loaded; there are no examples; or an example lacks a
            field, holds something other than text, has a label out of range or an empty ending, or (in a file) has two
            equal endings.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> (example,) = load_examples("pydocs-choice", build_tokenizer(), limit=1)
        >>> len(example.endings)
        4
    """
    task = find_task(name)
    rows = _rows(name, task, file)
    count = len(rows) if limit is None else min(limit, len(rows))
    if not count:
        raise UserError(f"{name}: {'its source' if file is None else file} holds no examples")
    return [_render(f"{name}, example {index + 1}", task, rows[index], tokenizer, file) for index in range(count)]


def _rows(name: str, task: Task, file: str | None) -> Sequence[Fields]:
    if file is not None:
        return _read_file(Path(file), whole=task.kind == "text")
    if not isinstance(task.source, HubSource):
        return task.source()
    # Imported here because it takes a second, which local tasks do without.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    source = task.source
    try:
        rows: Sequence[Fields] = load_dataset(source.path, source.configuration, split=source.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{name}: cannot load {source.path} from the Hub: {one_line(error)}") from error
    return rows


def _read_file(path: Path, whole: bool) -> Sequence[Fields]:
    """Return the rows of a JSON-lines file; with `whole`, any other file is one text."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        text = path.read_bytes().decode("utf-8")  # not read_text, which translates line ends
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if whole and path.suffix not in (".jsonl", ".json"):
        return [{"text": text}] if text else []
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold other separators
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except UserError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not an object with fields")
        rows.append(row)
    return rows


def _render(where: str, task: Task, row: Fields, tokenizer: PreTrainedTokenizerBase, file: str | None) -> Example:
    """Render a row, and check that its example can be scored."""
    try:
        example = task.render(repair_surrogates(row), tokenizer)
    except KeyError as error:
        raise UserError(f"{where}: the field {error} is missing; it has {', '.join(row)}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    for text in (*example.contexts, *example.endings):
        if not isinstance(text, str):
            raise UserError(f"{where}: {text!r} is not a text")
    if not 0 <= example.label < len(example.endings):
        raise UserError(f"{where}: the label {example.label} is not one of 0 to {len(example.endings) - 1}")
    if not all(ending.strip() for ending in example.endings):
        raise UserError(f"{where}: an ending is empty")
    pairs = list(zip(example.contexts, example.endings, strict=True))
    if file is not None and len(set(pairs)) < len(pairs):  # published datasets are scored unchanged
        raise UserError(f"{where}: two endings are equal, so neither can be right")
    return example


# Rendering, a function for each task.


def _choice(context: str, endings: Sequence[str], label: int) -> Example:
    if isinstance(endings, str):
        raise TypeError(f"the endings must be a list of texts, not {endings[:40]!r}")
    return Example([context] * len(endings), list(endings), label)


def _hellaswag(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render the harness's text. A file may give the context whole, as `ctx`, instead of in two halves."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_b" in row else row["ctx"]
    endings = [_strip_marks(ending) for ending in row["endings"]]
    return _choice(_strip_marks(f"{row['activity_label']}: {context}"), endings, int(row["label"]))


def _hellaswag_plain(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render the text of Karpathy's script and the original FGPT, without the activity and uncleaned."""
    return _choice(row["ctx"], row["endings"], int(row["label"]))


def _hellaswag_letters(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render the harness's text as a user's question with lettered choices, for the assistant to name one."""
    contexts, endings, label, _ = _hellaswag(row, tokenizer)
    if not tokenizer.chat_template:
        raise UserError("this task asks a chat model, and the tokenizer has no chat template: try hellaswag")
    choices = "\n".join(f"{letter}. {ending}" for letter, ending in zip(LETTERS, endings, strict=False))
    question = f"Which ending continues the text best?\n\n{contexts[0]} …\n\n{choices}\n\nAnswer with the letter alone."
    prompt = _chat_prompt(question, tokenizer)
    return _choice(prompt, list(LETTERS[: len(endings)]), label)._replace(delimiter="")


def _question(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render a user's question, for the assistant to reply with the answer and nothing else."""
    if not tokenizer.chat_template:
        raise UserError("this task asks a chat model, and the tokenizer has no chat template")
    return _choice(_chat_prompt(row["question"], tokenizer), [row["answer"]], 0)._replace(delimiter="")


def _chat_prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": question}]
    with rendering("the chat template refuses the question"):
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _strip_marks(text: str) -> str:
    """Remove the bracketed marks of HellaSwag's WikiHow half, by the harness's rule."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lambada(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    *words, last = row["text"].split(" ")
    return _choice(" ".join(words), [last], 0)


def _piqa(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], _label(row))


def _openbookqa(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(row["question_stem"], row["choices"]["text"], _label(row))


def _commonsense_qa(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"]["text"], strict=True))
    return _choice(f"Question: {row['question'].strip()}\n{choices}\nAnswer:", list(LETTERS), _label(row))


def _label(row: Fields) -> int:
    labels: list[str] = row["choices"]["label"]
    return labels.index(row["answerKey"].lstrip())


def _winogrande(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render two contexts, the gap filled with either option, and the text after the gap as the ending of both."""
    before, _, after = row["sentence"].partition("_")
    return Example([before + row["option1"], before + row["option2"]], [after.strip()] * 2, int(row["answer"]) - 1)


def _pydocs_choice(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice(row["context"], row["endings"], int(row["label"]))


def _text(row: Fields, tokenizer: PreTrainedTokenizerBase) -> Example:
    return _choice("", [row["text"]], 0)


def _validation_pydocs() -> Sequence[Fields]:
    documents = sorted((document_hash(text), text) for text in load_pydocs()["text"])
    return [{"text": text} for hash_fraction, text in documents if hash_fraction < VALIDATION_FRACTION]


def _fields(questions: Callable[[], list[Question]]) -> Callable[[], Sequence[Fields]]:
    return lambda: [question._asdict() for question in questions()]


_ARC, _HELLASWAG = "allenai/ai2_arc", HubSource("Rowan/hellaswag", None, "validation")

TASKS: Mapping[str, Task] = {
    "pydocs-choice": Task("choice", load_pydocs_choice, _pydocs_choice, "acc_norm"),
    "pydocs-validation": Task("text", _validation_pydocs, _text, "bits_per_byte"),
    "basic-qa": Task("reply", _fields(first_questions), _question, "exact_match"),
    "capitals-unseen": Task("reply", _fields(unseen_questions), _question, "exact_match"),
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
