"""What a run has reached, in a sentence, and the commands that come next, ready to copy."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fgpt_hf.config.presets import PRESETS_OF_STAGE
from fgpt_hf.config.runs import InstructRun, Run, TuningRun, kind_of_run
from fgpt_hf.errors import UserError
from fgpt_hf.report.measured import series
from fgpt_hf.runtime.duration import duration
from fgpt_hf.training.records import RECORD, Lines

Record = Mapping[str, Any]  # of `run.yaml`


class NextStep(NamedTuple):
    """A command, and what it is for."""

    purpose: str
    command: str


def describe_next_steps(folder: Path, recorded: Record, metrics: Lines) -> Iterator[str]:
    """Yield a sentence on what the run has reached, and a line for each command that comes next."""
    yield describe_result(recorded, metrics, is_finished=(folder / "model").is_dir())
    steps = list(next_steps(folder, recorded))
    width = max(len(step.purpose) for step in steps)
    for step in steps:
        yield f"  {step.purpose + ':':<{width + 1}}  {step.command}"


def describe_result(recorded: Record, metrics: Lines, is_finished: bool = True) -> str:
    """Return what a run has reached, in a sentence."""
    last = metrics[-1]
    state = "finished" if is_finished else "unfinished"
    first = (
        f"This {kind_of_run(recorded).stage} run is {state}: {last['tokens']:,} tokens in {duration(last['seconds'])}"
    )
    gains = [
        f"{name} {values[0]:.{digits}f} -> {values[-1]:.{digits}f}"
        for key, name, digits in (
            ("eval_loss", "validation loss", 3),
            ("eval_bits_per_byte", "bits per byte", 3),
            ("eval_rewards/margins", "reward margin", 3),
            ("answers_ended", "share of answers that end", 2),
        )
        if len(values := series(metrics, key).values) > 1
    ]
    return f"{', '.join([first, *gains])}."


def next_steps(folder: Path, recorded: Record) -> Iterator[NextStep]:
    """Yield the commands that come after a run, the likeliest first."""
    name, stage = shlex.quote(str(folder)), kind_of_run(recorded).stage
    if not (folder / "model").is_dir():
        yield NextStep("resume", "the same training command again")
        yield NextStep("watch it", fgpt_command("report", "--watch", name))
        return
    if stage == "base":
        yield NextStep("let it continue a text", fgpt_command("chat", name, '"Once upon a time"'))
        yield NextStep("teach it to answer", train_command("instruct", recorded, folder))
    else:
        yield NextStep("talk to it", fgpt_command("chat", name))
    if stage == "instruct":
        yield NextStep("align it", train_command("preference", recorded, folder))
    yield NextStep("see its curves", fgpt_command("report", name, "--html report.html"))
    if stage != "base":
        yield NextStep(
            "preview its upload", fgpt_command("publish", name, "user/name --space user/name-chat --dry_run")
        )


def train_command(stage: str, recorded: Record, before: Path) -> str:
    """Return the command that trains the next stage, from the model of the run in the folder `before`.

    Data of the same preset are its default; who trained on other data is to name conversations or pairs, too.
    """
    preset = recorded.get("preset") if recorded.get("preset") in PRESETS_OF_STAGE[stage] else "quickstart"
    data = [] if _is_of_preset(recorded) else [f"--dataset_name my_{'chats' if stage == 'instruct' else 'pairs'}.jsonl"]
    name, own = folder_after(before, stage), shlex.quote(str(before))
    options = (f"--preset {preset}", f"--model_name_or_path {own}", *data, f"--output_dir {shlex.quote(str(name))}")
    return fgpt_command(f"train-{stage}", *options)


def folder_after(before: Path, stage: str) -> Path:
    """Return a folder for the run of a stage that starts from another run.

    Example:
        >>> folder_after(Path("runs/mine/base"), "instruct").as_posix(), folder_after(Path("novels"), "instruct").name
        ('runs/mine/instruct', 'novels-instruct')
    """
    return before.with_name(
        stage if before.name in PRESETS_OF_STAGE else f"{before.name.removesuffix('-instruct')}-{stage}"
    )


def require_start(run: Run) -> None:
    """Raise UserError, with the command that comes first, if a tuning run is to start from a run that is not there."""
    name = run.start_model
    if name is None:
        return
    folder, stage = Path(name).expanduser(), "base" if isinstance(run, InstructRun) else "instruct"
    if (folder / RECORD).is_file() and not (folder / "model").is_dir():
        raise UserError(
            f"model_name_or_path={name} is a run that has no model yet: repeat its training command, which resumes it"
        )
    if (
        isinstance(run, TuningRun)
        and not folder.exists()
        and (name.startswith(("runs/", "./", "../", "/", "~")) or name.count("/") > 1)
    ):
        preset = run.preset if run.preset in PRESETS_OF_STAGE[stage] else "quickstart"
        command = fgpt_command(f"train-{stage}", f"--preset {preset}", f"--output_dir {shlex.quote(name)}")
        raise UserError(f"model_name_or_path={name}: there is no such folder. Train it first: {command}")


def fgpt_command(*arguments: str) -> str:
    """Return a command of this package, as it can be typed here."""
    if shutil.which("fgpt"):
        return " ".join(("fgpt", *arguments))
    command = Path(sys.executable).with_name("fgpt")
    here = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    return " ".join((str(here) if command.is_file() else "python -m fgpt_hf", *arguments))


def _is_of_preset(recorded: Record) -> bool:
    """Return whether a run has the data of its preset, the next stages of which are about the same."""
    preset = PRESETS_OF_STAGE[kind_of_run(recorded).stage].get(str(recorded.get("preset")))
    return preset is not None and recorded.get("dataset_name") == getattr(preset, "dataset_name", None)
