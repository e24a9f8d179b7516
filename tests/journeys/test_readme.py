"""The README tells the truth: what it names exists, and what it says to type runs, made small."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.quickstart import read_record
from tests.support.forked import run_command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    ((?:make|python|fgpt) .+)$", README, re.MULTILINE)]
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# Later flags win over earlier ones, so these make a run of minutes one of seconds.
SMALL_RUN = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--sample_steps", "2", "--save_steps", "2"]
SMALL = {
    "train_base.py": [
        *SMALL_RUN,
        *("--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2"),
        *("--max_position_embeddings", "128", "--eval_tasks", ""),
    ],
    "train_instruct.py": [*SMALL_RUN, "--max_new_tokens", "4"],
    "train_preference.py": SMALL_RUN,
    "chat": ["--max_new_tokens", "4"],
}
SUBSTITUTES = {"pydocs": "my_documents.jsonl", "pydocs-choice": "pydocs-choice=my_choices.jsonl"}


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for command in COMMANDS if command[0] == "make" for target in command[1:]}
    targets |= set(re.findall(r"`make (\w+)`", README))
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_path_of_the_tree_exists() -> None:
    paths = tree_paths(README)
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []


def tree_paths(text: str) -> list[str]:
    """Return the paths that the tree in a text shows: each line adds a name below the last shallower one."""
    folders: list[str] = []
    paths = []
    for indent, name in re.findall(r"^((?:[│ ]   )*)[├└]── (\S+)", text, re.MULTILINE):
        folders[len(indent) // 4 :] = [name]
        paths.append("/".join(folders))
    return paths


def test_the_figures_of_the_quickstart_are_those_of_a_recorded_one() -> None:
    for line in read_record(ROOT / "docs" / "quickstart.json").lines:
        assert line in README


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart").symlink_to("mine")
    programs = [write_program(tmp_path / f"program{number}.py", text) for number, text in enumerate(PROGRAMS)]
    commands = [*(made_small(command) for command in COMMANDS if command[0] != "make"), *programs]
    assert len(commands) > 9
    for program, *arguments in commands:
        done = run_command(program, *arguments, cwd=tmp_path)
        assert done.returncode == 0, (program, arguments, done.stderr)
        assert done.stdout.strip(), (program, arguments)


def made_small(command: list[str]) -> list[str]:
    """Return the same command on little data."""
    program, *arguments = command if command[0] == "fgpt" else command[1:]
    small = SMALL.get(arguments[0] if program == "fgpt" else program, [])
    return [program, *(SUBSTITUTES.get(argument, argument) for argument in arguments), *small]


def write_program(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return [str(path)]


def write_data(folder: Path) -> None:
    """Write the files that the README calls your own, and a benchmark."""
    numbers = range(600)
    turns = [({"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}) for n in numbers]
    endings = [f"{end} says." for end in ("Document", "that", "and", "make")]
    rows = {
        "my_documents.jsonl": [
            {"text": f"Document {n} says that {n} and {n + 1} make {2 * n + 1}. " * 9} for n in numbers
        ],
        "my_chats.jsonl": [{"messages": messages} for messages in turns],
        "my_pairs.jsonl": [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": str(n)} for n in numbers],
        "my_choices.jsonl": [{"context": f"Number {n} of", "endings": endings, "label": n % 4} for n in range(8)],
    }
    (folder / "my_texts").mkdir()
    for n in numbers:
        (folder / "my_texts" / f"{n}.txt").write_text(f"Document {n} says that {n} and {n + 1} make {2 * n + 1}. " * 9)
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")  # type: ignore[attr-defined]
