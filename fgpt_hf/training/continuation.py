"""Decide whether the run in a folder may resume with given options, and what it has already decided."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fgpt_hf.config.options import described_fields, flag_value
from fgpt_hf.config.runs import Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.runtime.plan import TrainingPlan

Record = Mapping[str, object]  # of `run.yaml`

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
LENGTH = ("max_steps", "warmup_steps")


def require_resumable(
    run: Run, recorded: Record, place: Path | str, instead: str = "choose another output_dir"
) -> None:
    """Raise UserError if options differ on which weights, data or the optimizer's state depend.

    Args:
        place: the folder or the branch that holds the recorded run.
        instead: what to do for a run with the options given.
    """
    for name in run.fixed_on_resume():
        if recorded.get(name) != getattr(run, name):
            raise UserError(
                f"{place} holds a run with {name}={flag_value(recorded.get(name))}, which cannot continue with "
                f"{name}={flag_value(getattr(run, name))}: resume with the recorded value, or {instead}"
            )
    if isinstance(run, TuningRun) and run.max_steps > 0 and recorded.get("num_train_epochs") != run.num_train_epochs:
        raise UserError(
            f"num_train_epochs={run.num_train_epochs} has no effect with max_steps={run.max_steps}: "
            "give --max_steps 0 with it"
        )
    if run.max_minutes is not None and recorded.get("max_minutes") != run.max_minutes:
        raise UserError(
            f"max_minutes={run.max_minutes:g} has no effect on the run in {place}, whose {recorded.get('max_steps')} "
            "steps are decided: give --max_steps to change them"
        )


def changed_option(run: Run, recorded: Record) -> str | None:
    """Return the first option in which a run differs from a recorded one, or None if they are the same.

    Options that the run leaves open differ from no value that was found for them, and the folder may have moved.
    """
    given = vars(run)
    skipped = {"output_dir", "auto_find_batch_size", *BATCH}
    if run.max_minutes is not None:
        skipped |= {*LENGTH}
    elif isinstance(run, TuningRun) and run.max_steps == 0:
        skipped |= {"max_steps"}
    for field, described in described_fields(run):
        if not described.one_time and field.name not in skipped and given[field.name] != recorded.get(field.name):
            return field.name
    return None if run.auto_find_batch_size or _rows_per_step(recorded) == _rows_per_step(given) else BATCH[0]


def describe_change(name: str, run: Run, recorded: Record) -> str:
    """Return what an option was in a recorded run and is in another one, in words.

    Example:
        >>> from fgpt_hf.config.runs import BaseRun
        >>> describe_change("tokenizer", BaseRun(tokenizer="mine"), {"tokenizer": None})
        'tokenizer=none instead of mine'
    """
    return f"{name}={flag_value(recorded.get(name))} instead of {flag_value(getattr(run, name))}"


def decided(plan: TrainingPlan, run: Run, recorded: Record) -> TrainingPlan:
    """Return the plan of a resumed run, with what it had left open as it was decided before."""
    if plan.minutes is not None:
        steps, warmup = (_number(recorded, name) for name in LENGTH)
        plan = replace(plan, max_steps=steps, warmup_steps=warmup, minutes=None)
    rows, micro_batches = (_number(recorded, name) for name in BATCH)
    if run.auto_find_batch_size and rows * micro_batches == plan.rows * plan.micro_batches:
        plan = replace(plan, rows=rows, micro_batches=micro_batches)
    return plan


def _rows_per_step(options: Record) -> int:
    """Return the rows of a step on each device: running out of memory divides them otherwise."""
    return _number(options, BATCH[0]) * _number(options, BATCH[1])


def _number(options: Record, name: str) -> int:
    value = options.get(name)
    if not isinstance(value, int):
        raise UserError(f"run.yaml is damaged: {name}={value} should be a whole number")
    return value
