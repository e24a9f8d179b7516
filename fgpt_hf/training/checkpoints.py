"""The folders of a run's checkpoints: which there are, which one to resume from, and which to delete."""

import logging
import shutil
from itertools import chain, count
from pathlib import Path

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.files import PARTIAL, integrity_error, write_atomically

logger = logging.getLogger(__name__)

PREFIX = "step_"
ABANDONED = "abandoned"  # the folder of checkpoints that were set aside
GOING_BACK = "going_back_to"  # while checkpoints are set aside: the file with the step that the run goes back to


def checkpoint_to_resume(run: Run, folder: Path) -> Path | None:
    """Return the checkpoint in `folder` that `run.resume_from_checkpoint` names: a path, or `latest`.

    None means that the run starts from its first step: one that is not to be resumed, or `latest` where no
    checkpoint was written yet.

    Raises:
        UserError: the named checkpoint is missing, damaged or another run's, or all that were written are damaged; or
            it is from a later step than the run's last one.
    """
    if run.resume_from_checkpoint is None:
        return None
    if run.resume_from_checkpoint == "latest":
        checkpoint = latest_valid_checkpoint(folder)
    else:
        checkpoint = _named_checkpoint(Path(run.resume_from_checkpoint), folder)
    if checkpoint and run.max_minutes is None and 0 < run.max_steps < step_of(checkpoint):
        raise too_few_steps(run.max_steps, step_of(checkpoint))
    return checkpoint


def _named_checkpoint(checkpoint: Path, folder: Path) -> Path:
    problem = integrity_error(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is None and checkpoint.resolve() not in [path.resolve() for path in checkpoints(folder)]:
        problem = f"a run continues from a checkpoint of its own, step_… in {folder}"
    if problem:
        raise UserError(
            f"resume_from_checkpoint={checkpoint}: {problem}; 'latest' takes the newest complete one, 'hub' the run's "
            "state on the Hub, and user/name@branch that of a branch"
        )
    return checkpoint


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are unchanged, or None if there are no checkpoints.

    Damaged ones that are passed over are logged.

    Raises:
        UserError: all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in found:
        if (problem := integrity_error(checkpoint)) is None:
            return checkpoint
        logger.warning("skipping the damaged checkpoint %s: %s", checkpoint, problem)
    if found:
        raise UserError(f"{folder} holds no complete checkpoint to resume from: start over with --overwrite_output_dir")
    return None


def too_few_steps(max_steps: int, step: int) -> UserError:
    """Return the error of a run that is to end before the step that it continues from."""
    return UserError(
        f"max_steps={max_steps} is below step {step}, from which the run continues: give at least {step}, or resume "
        "from an earlier checkpoint"
    )


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after.

    Example:
        >>> step_of(Path("runs/mine/checkpoints/step_00000500"))
        500
    """
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder.

    Example:
        >>> checkpoint_name(1000)
        'step_00001000'
    """
    return f"{PREFIX}{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first: damaged ones included, those that were set aside not."""
    going_back = folder / GOING_BACK
    last = int(going_back.read_text(encoding="utf-8")) if going_back.is_file() else None
    return [path for path in _all_checkpoints(folder) if last is None or step_of(path) <= last]


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Move the checkpoints of later steps to `abandoned/`, and return where they are now.

    They belong to a branch that the run leaves: `latest` must not take them, and rotation must not prefer them. If the
    process is killed before it has finished, `checkpoints` leaves out the rest, and the next call moves it.
    """
    later = [path for path in _all_checkpoints(folder) if step_of(path) > step]
    if not later:
        (folder / GOING_BACK).unlink(missing_ok=True)
        return []
    write_atomically(folder / GOING_BACK, str(step))
    (folder / ABANDONED).mkdir(exist_ok=True)
    moved = [path.rename(_unused(folder / ABANDONED / path.name)) for path in later]
    (folder / GOING_BACK).unlink()
    return moved


def _unused(path: Path) -> Path:
    """Return the path, with a number appended if it exists."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())


def rotate(folder: Path, keep: int, written: Path) -> None:
    """Delete all but the `keep` newest checkpoints, and folders that a killed process left unfinished.

    The one just `written` always stays.
    """
    older = [path for path in checkpoints(folder) if path != written]
    for path in (*older[keep - 1 :], *folder.glob(f"*{PARTIAL}")):
        shutil.rmtree(path, ignore_errors=True)


def _all_checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()), reverse=True)
