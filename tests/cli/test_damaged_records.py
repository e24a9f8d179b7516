"""A run's records may be damaged, or hostile: `fgpt report` and `fgpt publish` name the file, in one line."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpt_hf.cli.main import run as run_fgpt
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from tests.support.run_folders import write_run
from tests.test_parsing import BOMB, MERGES

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
STEP = '"step": 1, "tokens": 1, "seconds": 1'


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tuned", model_name_or_path="gpt2", dataset_name="a/b")


@pytest.fixture
def run(intact: Path) -> Iterator[Path]:
    """The run's folder, whose records are put back after the test."""
    records = {path: path.read_bytes() for path in intact.iterdir() if path.is_file()}
    yield intact
    for path, content in records.items():
        path.write_bytes(content)


DAMAGES = {
    "run.yaml": ["[1]", "", BOMB, MERGES, "x: &a 1\ny: *a", "preset: 5\nmax_steps: [1]", "max_steps: .nan", "1: 2"],
    "metrics.jsonl": [
        "[1]\n",
        "null\n",
        '{"loss": 1}\n',
        '{"step": "x", "tokens": 1, "seconds": 1}\n',
        '{"step": null, "tokens": null, "seconds": null}\n',
        f'{{{STEP}, "loss": {{"a": 1}}}}\n',
        f'{{{STEP}, "hellaswag/acc": [1]}}\n',
        '{"step": -1, "tokens": 1, "seconds": 1}\n',
        '{"step": 1e400, "tokens": 1, "seconds": 1}\n',
        DEEP + "\n",
        '{"step": ' + "9" * 5000 + "}\n",
    ],
    "samples.jsonl": [
        "[1]\n",
        '{"step": 1}\n',
        '{"step": "1", "prompt": "a"}\n',
        '{"step": 1, "prompt": [1]}\n',
        "{\n",
    ],
    "provenance.json": [
        '{"source": {"dataset_name": null}}',
        '{"source": {"validation_fraction": "x"}}',
        "[]",
        "{",
        DEEP,
        '{"data": 5}',
        '{"data": {"train": {"documents": NaN}}}',
        '{"versions": "x"}',
        '{"started_from": 5}',
        '{"started_from": {"run": [1]}}',
        '{"started_from": {"run": {"max_steps": "x"}}}',
        '{"training_flops": "many"}',
    ],
    "results.json": [
        "[]",
        "{",
        '{"tasks": 5}',
        '{"tasks": {"piqa": {"acc": "x"}}}',
        '{"tasks": {"piqa": {"acc": 1}}, "datasets": {"piqa": 5}}',
        '{"tasks": {"piqa": {"acc": 1}}, "runs": [1]}',
        '{"conventions": 5}',
    ],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("arguments", [["report"], ["publish", "user/name", "--dry_run"]], ids=lambda given: given[0])
@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in DAMAGES.items() for content in contents],
    ids=lambda text: str(text)[:30],
)
def test_a_damaged_record_is_named(run: Path, name: str, content: str, arguments: list[str]) -> None:
    (run / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        run_fgpt([arguments[0], str(run), *arguments[1:]])


@pytest.mark.parametrize(
    "content",
    [
        f'{{{STEP}, "loss": NaN, "eval_loss": Infinity, "grad_norm": -1, "tokens_per_second": 1e400}}\n',
        f'{{{STEP}, "loss": 1e300}}\n{{{STEP}, "loss": -1e300}}\n',
        f'{{{STEP}, "a/b\\n# c <script> $x$ _ \\ud800": 1}}\n',
    ],
)
def test_numbers_that_are_none_and_odd_names_are_shown(run: Path, content: str) -> None:
    (run / "metrics.jsonl").write_text(content)
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "\\ud800", "greedy": "\\n# \\ud800", "sampled": "$x$"}\n')
    run_fgpt(["report", str(run)])
    run_fgpt(["publish", str(run), "user/name", "--dry_run"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "content",
    [BOMB, MERGES, "max_steps: [1]", "max_steps: {a: 1}", 'preset: "a\\0b"', "1: 2", "- a", "x: !!binary aGk=", "\x00"],
    ids=range(9),
)
def test_a_hostile_config_file_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"--config {path}"):
        parse_run(BaseRun, PRESETS, ["--config", str(path)])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_pipe_in_place_of_a_record_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="is not a run"):
        run_fgpt(["report", str(tmp_path)])
    with pytest.raises(UserError, match="there is no such file"):
        parse_run(BaseRun, PRESETS, ["--config", str(tmp_path / "run.yaml")])
