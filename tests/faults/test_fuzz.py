"""Whatever a user gives, every reader and every command line answers: with a result, or with one line and exit code 2.

The short form takes about a minute. The long form, `FGPT_FAULTS=long`, tries ten thousand inputs.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fgpt_hf.cli import estimate
from fgpt_hf.cli.main import run as run_fgpt
from fgpt_hf.config.parser import parse_options, parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun, Preparation
from fgpt_hf.data.conversations import load_conversations
from fgpt_hf.data.corpora import open_corpus
from fgpt_hf.data.dataset_names import parse_mixture
from fgpt_hf.data.mixtures import RowIssues
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.data.preference_pairs import load_pairs
from fgpt_hf.data.shard_records import Manifest, Recipe, ShardRecord
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.tasks import TASKS, load_examples
from fgpt_hf.files import SEAL, integrity_error, write_manifest, write_sealed_json
from fgpt_hf.hub.card_merge import mark_as_generated, merge_card
from fgpt_hf.hub.front_matter import results_of_card, tidy_card
from fgpt_hf.model.io import load_model
from fgpt_hf.retries import reading
from fgpt_hf.runtime.estimation import Estimation
from fgpt_hf.tokenizer.fast_encoding import encode_conversations
from fgpt_hf.training.records import read_record
from fgpt_hf.training.state import _read_training_state
from tests.faults.conftest import Tally
from tests.faults.hostile import changed, command_lines, damaged, json_lines, json_texts, values
from tests.faults.runs import LONG
from tests.support.messages import say
from tests.support.run_folders import METRICS, PROVENANCE, RESULTS, SAMPLES, write_run
from tests.support.tiny import tokenizer

pytestmark = pytest.mark.timeout(3600)
SHARE_OF_SHORT = 1 if LONG else 20  # of the inputs below, one in so many


def answers(call: Callable[[], object]) -> None:
    """Call, and accept what the command line answers with one line; anything else is a traceback."""
    try:
        call()
    except UserError:
        return
    except OSError as error:
        if error.errno is None:
            raise
    except SystemExit as error:
        assert error.code in (None, 0), error.code


def try_inputs(
    strategy: st.SearchStrategy[Any], call: Callable[[Any], object], tally: Tally, inputs: int, kind: str
) -> None:
    """Give `call` so many inputs of the strategy, in the long form; hypothesis shrinks the first that fails."""

    @settings(
        max_examples=max(4, inputs // SHARE_OF_SHORT),
        deadline=None,
        derandomize=not LONG,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(given_input: Any) -> None:
        tally(f"input: {kind}")
        answers(lambda: call(given_input))

    attempt()


def into_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Return a function that writes a file and then reads it."""

    def call(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return call


# A run's folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("fuzz") / "run", model_name_or_path="a/b", dataset_name="a/b:7,c*2")


RECORDS: Mapping[str, st.SearchStrategy[bytes]] = {
    "run.yaml": st.one_of(
        changed(asdict(INSTRUCT_PRESETS["quickstart"])).map(lambda value: yaml.dump(value).encode()),
        damaged(INSTRUCT_PRESETS["quickstart"].to_yaml().encode()),
    ),
    "metrics.jsonl": json_lines(METRICS),
    "samples.jsonl": json_lines(SAMPLES),
    "provenance.json": json_texts(
        {**PROVENANCE, "started_from": {"run": {"max_steps": 5}, "provenance": PROVENANCE, "last": METRICS[0]}}
    ),
    "results.json": json_texts(RESULTS),
    "model/README.md": st.one_of(
        changed({"license": "mit", "tags": ["a"], "model-index": [{"name": "x", "results": []}]}).map(
            lambda value: f"---\n{yaml.dump(value)}---\n# x\n".encode()
        ),
        damaged(b"---\nlicense: mit\n---\n# A model\n"),
    ),
}


@pytest.mark.parametrize("command", ["report", "publish"])
@pytest.mark.parametrize("name", RECORDS)
def test_records_of_a_run(
    run_folder: Path, name: str, command: str, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fgpt_hf.report.figures.draw_figure", lambda metrics, figure, path: path
    )  # pictures are drawn once below
    path = run_folder / name
    before = path.read_bytes() if path.exists() else None
    more = ["user/name", "--dry_run"] if command == "publish" else []
    read = into_file(path, lambda: run_fgpt([command, str(run_folder), *more]))
    try:
        try_inputs(RECORDS[name], read, tally, 150, "records of a run")
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


def test_figures(run_folder: Path, tally: Tally) -> None:
    path = run_folder / "metrics.jsonl"
    before = path.read_bytes()
    read = into_file(path, lambda: run_fgpt(["report", str(run_folder)]))
    try_inputs(json_lines(METRICS), read, tally, 40, "records of a run")
    path.write_bytes(before)


def test_cards(tally: Tally) -> None:
    card = "---\nlicense: mit\ntags: [a]\nmodel-index:\n- name: x\n  results: []\n---\n# A model\n\nText.\n"
    ours = mark_as_generated(card)
    texts = damaged(card.encode()).map(lambda content: content.decode("utf-8", "replace"))
    fronts = changed({"license": "mit", "tags": ["a"], "datasets": "b", "model-index": [{"name": "x", "results": []}]})

    def read(theirs: str) -> None:
        for call in (tidy_card, results_of_card, mark_as_generated, lambda text: merge_card(ours, text)):
            answers(lambda call=call: call(theirs))

    written = fronts.map(lambda value: f"---\n{yaml.dump(value)}---\n# x\n")
    try_inputs(st.one_of(texts, written), read, tally, 500, "cards")


# Manifests and states


def test_manifests(tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "a.txt").write_text("a")
    write_manifest(tmp_path)
    intact = json.loads((tmp_path / "manifest.json").read_text())
    read = into_file(tmp_path / "manifest.json", lambda: integrity_error(tmp_path))
    try_inputs(json_texts(intact), read, tally, 500, "manifests")


SIZES = {split: {"documents": 5, "tokens": 50, "rows": 2, "padding": 1, "cut": 1} for split in ("train", "validation")}
POSITION = {"buffer": 0, "opened": 1, "shards": [[0, [0, 5]]]}
SEALED: Mapping[str, tuple[Callable[[Path], object], Mapping[str, Any]]] = {
    "prepared.json": (
        Manifest.read,
        {**{field.name: "x" for field in fields(Recipe)}, "made": {"sizes": SIZES, "content": "x"}},
    ),
    "shard.json": (
        ShardRecord.read,
        {
            "recipe": "x",
            "begin": POSITION,
            "end": None,
            "sizes": SIZES,
            "files": {split: {"bytes": 5, "sha256": "x"} for split in SIZES},
        },
    ),
}


@pytest.mark.parametrize("name", SEALED)
def test_manifests_of_prepared_rows(name: str, tmp_path: Path, tally: Tally) -> None:
    read, intact = SEALED[name]

    def seal_and_read(content: Any) -> None:
        write_sealed_json(tmp_path / name, content if isinstance(content, dict) else {SEAL: content})
        read(tmp_path / name)

    try_inputs(changed(intact), seal_and_read, tally, 400, "manifests")
    try_inputs(json_texts(intact), into_file(tmp_path / name, lambda: read(tmp_path / name)), tally, 200, "manifests")


def test_states_of_a_checkpoint(tmp_path: Path, tally: Tally) -> None:
    """They are hashed before they are read; a state that somebody made runs nothing, and is refused or read."""
    path, proof = tmp_path / "training.pt", tmp_path / "executed"
    torch.save({"optimizer": {"state": torch.zeros(3)}, "progress": {"step": 1}}, path)
    states = [path.read_bytes(), f"cos\nsystem\n(S'touch {proof}'\ntR.".encode()]
    strategy = st.sampled_from(states).flatmap(lambda state: st.one_of(st.just(state), damaged(state)))
    try_inputs(strategy, into_file(path, lambda: _read_training_state(path)), tally, 300, "states of a checkpoint")
    assert not proof.exists()


# Models


MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize("name", [*MODEL_FILES, "model.safetensors"])
def test_files_of_a_model(name: str, run_folder: Path, tmp_path: Path, tally: Tally) -> None:
    folder = Path(copytree(run_folder / "model", tmp_path / "model"))
    content = (folder / name).read_bytes()
    if name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        strategy = damaged(content[:2000] if name == "model.safetensors" else content)
        if name == "model.safetensors":
            strategy = strategy.map(lambda header: header + content[2000:])
    else:
        strategy = json_texts(json.loads(content))
    read = into_file(folder / name, lambda: load_model(str(folder)))
    try_inputs(strategy, read, tally, 60, "files of a model")


# Data


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    rmtree(tmp_path / "cache", ignore_errors=True)


CHATS = [{"messages": say("2 + 2?", "4.")}, {"messages": say("Hi", "Hello", system="Be brief.")}]
PAIRS = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"}]
DOCUMENTS = [{"text": "Once upon a time"}, {"text": "café 😀"}]
FORMATS = {"conversations": CHATS, "pairs": PAIRS, "documents": DOCUMENTS}


def read_data(kind: str, path: Path) -> None:
    if kind == "conversations":
        found = load_conversations(InstructRun(dataset_name=str(path)), RowIssues())
        encode_conversations(tokenizer(), [each.messages for each in found])
    elif kind == "pairs":
        pairs = load_pairs(PreferenceRun(dataset_name=str(path)), RowIssues())
        encode_conversations(tokenizer(), [side for pair in pairs for side in pair.conversations])
    else:
        for shard in open_corpus(BaseRun(dataset_name=str(path))):
            with reading(str(path)):  # as the stream of documents does
                list(shard.read(ShardPosition()))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("kind", FORMATS)
def test_data_files(kind: str, tmp_path: Path, tally: Tally) -> None:
    number = count()

    def read(content: bytes) -> None:
        path = tmp_path / f"{next(number)}.jsonl"  # a name of its own, since `datasets` caches by it
        path.write_bytes(content)
        read_data(kind, path)

    try_inputs(json_lines(FORMATS[kind]), read, tally, 120, "data files")


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("kind", FORMATS)
def test_parquet_files(kind: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "intact.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FORMATS[kind]), path)
    number = count()

    def read(content: bytes) -> None:
        damaged_path = tmp_path / f"{next(number)}.parquet"
        damaged_path.write_bytes(content)
        read_data(kind, damaged_path)

    try_inputs(damaged(path.read_bytes()), read, tally, 60, "data files")


@pytest.mark.parametrize("kind", ["conversations", "pairs"])
def test_rows(kind: str, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any values that arrow can hold."""

    def read(row: Any) -> None:
        try:
            rows = datasets.Dataset.from_list([row if isinstance(row, dict) else {"messages": row}] * 2)
        except (pyarrow.ArrowException, OverflowError, ValueError, TypeError, UnicodeError):
            return
        monkeypatch.setattr("fgpt_hf.data.mixtures.load_rows", lambda *given: rows)
        if rows.column_names:
            read_data(kind, Path("rows.json"))

    layouts = [*FORMATS[kind], {"instruction": "a", "input": "b", "output": "c", "chosen": "d", "rejected": "e"}]
    try_inputs(st.sampled_from(layouts).flatmap(changed), read, tally, 600, "rows")


def test_conversations_for_the_tokenizer(tally: Tally) -> None:
    strategy = changed([say("2 + 2?", "4.", system="Be brief."), say("Hi", "Hello")])

    def read(conversations: Any) -> None:
        if isinstance(conversations, list) and all(
            isinstance(chat, list) and all(isinstance(message, dict) for message in chat) for chat in conversations
        ):
            encode_conversations(tokenizer(), conversations)

    try_inputs(strategy, read, tally, 600, "rows")


EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "pydocs-choice": {"context": "a", "endings": ["b", "c"], "label": 0},
    "hellaswag": {"activity_label": "a", "ctx": "b", "endings": ["c", "d"], "label": "1"},
    "hellaswag_letters": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["c", "d"], "label": 1},
    "basic-qa": {"question": "a", "answer": "b"},
    "lambada": {"text": "a b c"},
    "piqa": {"goal": "a", "sol1": "b", "sol2": "c", "label": 0},
    "arc_easy": {"question": "a", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"},
    "commonsense_qa": {"question": "a", "choices": {"text": list("abcde"), "label": list("ABCDE")}, "answerKey": "A"},
    "pydocs-validation": {"text": "a"},
}


@pytest.mark.parametrize("task", EXAMPLES)
def test_examples_of_a_task(task: str, tmp_path: Path, tally: Tally) -> None:
    assert task in TASKS
    path = tmp_path / "examples.jsonl"
    read = into_file(path, lambda: load_examples(task, tokenizer(), str(path)))
    try_inputs(json_lines([EXAMPLES[task]]), read, tally, 100, "examples of a task")


# Command lines


def flags_of(kind: type[Any]) -> list[str]:
    return [f"--{field.name}" for field in fields(kind)]


PARSERS: Mapping[str, tuple[Callable[[Sequence[str]], object], Sequence[str]]] = {
    "train-base": (lambda given: parse_run(BaseRun, PRESETS, given), flags_of(BaseRun)),
    "train-instruct": (lambda given: parse_run(InstructRun, INSTRUCT_PRESETS, given), flags_of(InstructRun)),
    "train-preference": (lambda given: parse_run(PreferenceRun, PREFERENCE_PRESETS, given), flags_of(PreferenceRun)),
    "prepare": (lambda given: parse_options(Preparation, given), flags_of(Preparation)),
    "estimate": (estimate.main, flags_of(Estimation)),
}


@pytest.mark.parametrize("command", PARSERS)
def test_command_lines_of_runs(command: str, tally: Tally) -> None:
    parse, flags = PARSERS[command]
    try_inputs(command_lines([*flags, "--config"]), parse, tally, 500, "command lines")


def test_config_files(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "run.yaml"
    read = into_file(path, lambda: parse_run(InstructRun, INSTRUCT_PRESETS, ["--config", str(path)]))
    try_inputs(RECORDS["run.yaml"], read, tally, 500, "config files")
    try_inputs(RECORDS["run.yaml"], into_file(path, lambda: read_record(path)), tally, 200, "config files")


COMMANDS: Mapping[str, Sequence[str]] = {
    "chat": ["--system", "--greedy", "--temperature", "--top_k", "--top_p", "--max_new_tokens", "--seed"],
    "evaluate": ["--tasks", "--limit", "--bf16", "--tokens_per_batch", "--seed", "--out", "--update_card"],
    "convert": ["--vocab_size", "--num_attention_heads"],
    "export": ["--format"],
    "report": ["--help"],
    "publish": ["--dry_run", "--private", "--revision", "--tag", "--as", "--license", "--space", "--watts"],
    "": ["--version"],
}
WORK = (
    "fgpt_hf.model.io.load_model",
    "fgpt_hf.cli.evaluate.run_evaluation",
    "fgpt_hf.convert.convert.load_config",
    "fgpt_hf.convert.export.load_fgpt",
    "fgpt_hf.hub.publish.push_files",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines(command: str, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are parsed and checked; the work behind them is not done."""

    def work(*given: object, **options: object) -> None:
        raise OSError(errno.ECANCELED, "the work is not done here")

    for name in WORK:
        monkeypatch.setattr(name, work)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    words = [str(tmp_path), os.devnull, "user/name", "gpt2"]
    given = command_lines(COMMANDS[command], words)
    try_inputs(
        given, lambda arguments: run_fgpt([command, *arguments] if command else arguments), tally, 250, "command lines"
    )


def test_mixtures(tally: Tally) -> None:
    text = st.text(st.sampled_from("ab/:*,. 059-\n\u0660"), max_size=12)
    try_inputs(st.one_of(text, values.map(str)), parse_mixture, tally, 500, "command lines")


def test_checkpoints_of_other_programs(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"transformer.wte.weight": torch.zeros(3, 2), "model_args": {"n_head": 2}}, path)
    read = into_file(path, lambda: run_fgpt(["convert", str(path), str(tmp_path / "made")]))
    try_inputs(damaged(path.read_bytes()), read, tally, 200, "states of a checkpoint")
    numbers = count()

    def write_and_convert(content: Any) -> None:
        torch.save(content, path)
        run_fgpt(["convert", str(path), str(tmp_path / f"made{next(numbers)}")])

    plain = changed({"transformer.wte.weight": [1], "model_args": {"n_head": 2}, "model": {"a.b": 1}})
    try_inputs(plain, write_and_convert, tally, 200, "states of a checkpoint")
