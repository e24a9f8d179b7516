"""`fgpt`: its help comes at once, and what it does not understand is one line with what was probably meant."""

import os
import re
import subprocess
import sys

import pytest

import fgpt_hf
from fgpt_hf.cli.main import COMMANDS, run

# Makes an import of what takes seconds an error.
BLOCKED = "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['datasets'] = None; "


def without_torch(program: str) -> str:
    """Return what a program prints in a process that cannot import torch, transformers or datasets."""
    done = subprocess.run([sys.executable, "-c", BLOCKED + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_help_names_all_commands_without_torch_and_transformers() -> None:
    text = without_torch("from fgpt_hf.cli.main import run; run(['--help'])")
    listed = re.findall(r"^  ([a-z-]+)  +\S", text.partition("Commands:")[2], flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    assert "..." not in text.partition("Commands:")[2]  # no summary is cut off


def test_the_help_comes_within_a_second() -> None:
    """Of a core's time, however busy the machine is."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "fgpt_hf", "--help"], check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 1


@pytest.mark.parametrize("command", ["chat", "evaluate", "report", "ablate", "convert", "export", "publish"])
def test_the_help_of_a_command_has_an_example_and_needs_no_torch(command: str) -> None:
    text = without_torch(f"from fgpt_hf.cli.main import run; run(['{command}', '--help'])")
    assert f"Example: fgpt {command} " in text
    assert not re.search(r"<(int|float|str|path)>|list\[", text)  # but N, X, TEXT or FILE, as a run's help says
    for help in re.findall(r"^  --\w+.*?(?=^  --|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        sentence = re.sub(r"\s+\[(default|required).*", "", help, flags=re.DOTALL)
        assert sentence.rstrip().endswith((".", "exit.")), help


@pytest.mark.parametrize("command", ["train-base", "train-instruct", "train-preference", "prepare", "estimate"])
def test_the_help_of_a_run_lists_its_fields(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"Example: fgpt {command} --" in text and f"usage: fgpt {command} " in text and "--dataset_name" in text


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    assert capsys.readouterr().out.startswith("Usage: fgpt [OPTIONS] COMMAND")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--version"])
    assert capsys.readouterr().out == f"fgpt {fgpt_hf.__version__}\n"


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["chatt"], "No such command 'chatt'. Did you mean 'chat'? (fgpt --help explains)"),
        (["--vers"], "No such option: --vers. Did you mean --version? (fgpt --help explains)"),
        (["evaluate", "model", "--limt"], "No such option: --limt. Did you mean --limit? (fgpt evaluate --help"),
        (["export", "model"], "Missing argument 'TARGET' (fgpt export --help explains)"),
        (["report"], "Missing argument 'RUN' (fgpt report --help explains)"),
        (["evaluate", "model", "--limit", "many"], "'--limit': 'many' should be a valid integer"),
        (["publish", "model", "user/name", "--as", "lama"], "'--as': 'lama' is not one of 'fgpt', 'auto', 'gpt2'"),
        (["prepare", "--max_train_tokenz=3"], "'--max_train_tokenz=3': did you mean --max_train_tokens?"),
        (["prepare", "--max_train_tokens=0"], "max_train_tokens=0 must be above zero"),
        (["train-base", "--max_stepz", "3"], "did you mean --max_steps?"),
        (["train-base", "--seed=4294967296"], "seed=4294967296 must be zero or more and at most 4294967295"),
        (["train-base", "--preset=quickstart", "--fsdp"], "start the run with torchrun, or leave the flag out"),
        (["estimate", "--device=h1000"], "device='h1000' is not known: the devices are"),
    ],
)
def test_what_is_not_understood_is_one_line(arguments: list[str], answer: str) -> None:
    with pytest.raises(ValueError) as error:
        run(arguments)
    assert answer in str(error.value) and "\n" not in str(error.value)


def test_options_may_be_written_with_hyphens() -> None:
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        run(["publish", "nowhere", "user/name", "--dry-run"])
