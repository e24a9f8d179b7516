"""The folder of a run: its record, metrics, samples, results, and where its model comes from."""

import logging
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import Timeout
from transformers import PreTrainedConfig

from fgpt_hf.config.option_groups import DatasetOptions, TextSource
from fgpt_hf.config.runs import Run
from fgpt_hf.data.dataset_names import parse_mixture, parse_validation_names
from fgpt_hf.data.sources import DataProvenance
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import TaskResult
from fgpt_hf.evaluation.results import package_versions, results_record, write_results
from fgpt_hf.files import (
    PARTIAL,
    append_json_line,
    locked,
    read_json,
    read_json_lines,
    write_atomically,
    write_json,
    write_json_lines,
)
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import model_name
from fgpt_hf.model.license import license_of
from fgpt_hf.model.own_code import network_code_hash
from fgpt_hf.parsing import Kind, as_type, parse_yaml
from fgpt_hf.runtime.estimate import flops_per_token
from fgpt_hf.runtime.hardware import device_name
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.tokenizer.surrogates import repair_surrogates
from fgpt_hf.training.checkpoints import (
    checkpoint_name,
    checkpoint_to_resume,
    checkpoints,
    rotate,
    set_aside_after,
    step_of,
)
from fgpt_hf.training.continuation import changed_option, decided, require_resumable
from fgpt_hf.training.provenance import Provenance, RunBefore

logger = logging.getLogger(__name__)

RECORD, METRICS, SAMPLES = "run.yaml", "metrics.jsonl", "samples.jsonl"
RESULTS, PROVENANCE = "results.json", "provenance.json"
MANY = 1e18  # more steps, tokens or seconds than any run has


class RunFolder:
    """The folder of one run: `run.yaml`, `metrics.jsonl`, `samples.jsonl`, `figures/`, `checkpoints/` and `model/`.

    No other process can open it meanwhile. Only the process of rank 0 writes.

    Example:
        >>> from tempfile import mkdtemp
        >>> from fgpt_hf.config.runs import BaseRun
        >>> folder = RunFolder(BaseRun(output_dir=f"{mkdtemp()}/run"))
        >>> with folder.opened():
        ...     folder.begin(TrainingPlan(max_steps=10, rows=4, micro_batches=1))
        >>> read_record(folder.record)["max_steps"]
        10
    """

    def __init__(self, run: Run, rank: int = 0) -> None:
        self.run, self.path, self.is_writer = run, run.folder, rank == 0
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.record = self.path / RECORD

    @contextmanager
    def opened(self, fetch: Callable[[], Run] | None = None) -> Iterator[None]:
        """Reserve the folder for this run; nothing in it changes before `begin`, but by `fetch`.

        The same run, if unfinished, resumes from its last checkpoint.

        Args:
            fetch: writes a state from elsewhere into the folder, and returns the run with what to resume from.

        Raises:
            UserError: it holds a finished run or another one, and neither resuming nor overwriting was asked for; it
                holds another run than the one to resume; or another process is writing to it.
        """
        if not self.is_writer:
            yield
            return
        try:
            with locked(self.path.with_name(f".{self.path.name}.lock"), timeout=0):
                if fetch:
                    self.run = fetch()
                self._check()
                yield
        except Timeout as error:
            raise UserError(f"{self.path} is being written to by another run: choose another output_dir") from error

    @cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, its files verified; None if the run starts from its first step.

        Raises:
            UserError: as `checkpoint_to_resume`.
        """
        return checkpoint_to_resume(self.run, self.checkpoints)

    def decided(self, plan: TrainingPlan) -> TrainingPlan:
        """Return the plan with what a resumed run has decided before; every process calls it."""
        found = [plan]
        if self.is_writer and self.checkpoint is not None:
            found = [decided(plan, self.run, read_record(self.record))]
        broadcast_object_list(found)
        return found[0]

    def begin(self, plan: TrainingPlan, resumed_at: int | None = None) -> None:
        """Record the run, in a new folder, in place of the run to overwrite, or after the step that it continues from.

        Later checkpoints are set aside, and lines of later steps deleted, because the run writes them again. Older
        checkpoints are deleted that a process killed after its last save had left.
        """
        if not self.is_writer:
            return
        if self.run.overwrite_output_dir and resumed_at is None:
            self._delete_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if resumed_at is not None:
            self._set_aside_after(resumed_at)
            self._rotate(resumed_at)
        for path in (self.path / METRICS, self.path / SAMPLES):
            if path.is_file():
                write_json_lines(path, _lines_until(path, -1 if resumed_at is None else resumed_at))
        for unfinished in self.path.glob(f"*{PARTIAL}"):
            _delete(unfinished)
        self.record_run(plan)

    def _delete_run(self) -> None:
        """Delete what the folder holds: the checkpoints at one stroke, so that none is left to resume from."""
        if self.checkpoints.is_dir():
            self.checkpoints.rename(f"{self.checkpoints}{PARTIAL}")
        for path in self.path.iterdir() if self.path.is_dir() else ():
            _delete(path)

    def _set_aside_after(self, step: int) -> None:
        if moved := set_aside_after(self.checkpoints, step):
            names = ", ".join(path.name for path in reversed(moved))
            logger.warning(
                "the run goes back to step %d: its later checkpoints (%s) are set aside in %s; delete them when they "
                "are not needed",
                *(step, names, moved[0].parent),
            )

    def _rotate(self, step: int) -> None:
        checkpoint = self.checkpoints / checkpoint_name(step)
        if checkpoint.is_dir():  # not where the run continues from a checkpoint of another folder
            rotate(self.checkpoints, self.run.save_total_limit, checkpoint)

    def record_run(self, plan: TrainingPlan) -> None:
        """Write the run to `run.yaml`, with the plan in place of what the run left open."""
        if self.is_writer:
            write_atomically(self.record, plan.fill_in(self.run).to_yaml())

    def append_metrics(self, line: Mapping[str, float]) -> None:
        """Add a line to `metrics.jsonl`; it holds the step that it belongs to."""
        if self.is_writer:
            append_json_line(self.path / METRICS, line)

    def append_sample(self, line: Mapping[str, str | int]) -> None:
        """Add a line to `samples.jsonl`; it holds the step that it belongs to."""
        if self.is_writer:
            append_json_line(self.path / SAMPLES, line)

    def _check(self) -> None:
        """Raise UserError unless the folder is free for the run, or holds what it continues."""
        holds_run = self.record.is_file()
        if holds_run and self.run.resume_from_checkpoint is None and not self.run.overwrite_output_dir:
            self._require_unfinished(read_record(self.record))
            self.run = replace(self.run, resume_from_checkpoint="latest")
            logger.info("%s holds this run, unfinished: resuming%s", self.path, self._from_where())
        if self.run.resume_from_checkpoint is not None:
            self._check_resumable(holds_run)

    def _require_unfinished(self, recorded: Mapping[str, object]) -> None:
        """Raise UserError if the folder holds another run, or this one finished."""
        ways = "replace it with --overwrite_output_dir, or choose another --output_dir"
        if name := changed_option(self.run, recorded):
            is_fixed = name in self.run.fixed_on_resume()
            resume = "" if is_fixed else "continue it with --resume_from_checkpoint latest, "
            found, given = recorded.get(name), getattr(self.run, name)
            raise UserError(f"{self.path} already holds a run, with {name}={found} instead of {given}: {resume}{ways}")
        last = recorded.get("max_steps")
        if self.model.exists() and isinstance(last, int) and self._last_step() >= last:
            raise UserError(
                f"{self.path} already holds this run, finished: train on with --resume_from_checkpoint latest and more "
                f"--max_steps than {last}, {ways}"
            )

    def _last_step(self) -> float:
        """Return the step of the newest checkpoint; infinity if there is a model without one."""
        return next((step_of(path) for path in checkpoints(self.checkpoints)), math.inf)

    def _from_where(self) -> str:
        return f" from step {step_of(self.checkpoint):,}" if self.checkpoint else ""

    def _check_resumable(self, holds_run: bool) -> None:
        if holds_run:
            require_resumable(self.run, read_record(self.record), self.path)
        if self.checkpoint is not None and not holds_run:
            raise UserError(f"{self.path} holds checkpoints but no {RECORD}, so it is unknown what run they are of")
        if self.checkpoint is None and self.model.exists():
            raise UserError(
                f"{self.path} holds a model but no checkpoint to continue from: choose another output_dir, or start "
                "over with --overwrite_output_dir instead of --resume_from_checkpoint"
            )
        if self.checkpoint is None:
            logger.info("%s holds no checkpoint yet: the run starts from its first step", self.path)


def _lines_until(path: Path, last: int) -> list[dict[str, Any]]:
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise UserError(f"{path} is damaged: line {number} has no step")
    return [line for line in lines if line["step"] <= last]


def _delete(path: Path) -> None:
    """Delete a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_record(path: Path) -> dict[str, Any]:
    """Return the values in a `run.yaml`; raise UserError if it is damaged."""
    return parse_record(path.read_bytes().decode(errors="replace"), str(path))


def parse_record(text: str, where: str) -> dict[str, Any]:
    """Return the values in the text of a `run.yaml`; raise UserError, which says where it is from, if it is damaged."""
    try:
        recorded = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    plain = (str, int, float, type(None))
    if not isinstance(recorded, dict) or not all(
        isinstance(name, str) and isinstance(value, plain) for name, value in recorded.items()
    ):
        raise UserError(f"{where} is damaged: it should hold the run's options, one per line")
    return recorded


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's `metrics.jsonl`: numbers by name, `step`, `tokens` and `seconds` among them.

    Raises:
        UserError: a line is anything else.
    """
    path = folder / METRICS
    lines = [
        _typed(path, number, dict[str, int | float], line) for number, line in enumerate(read_json_lines(path), start=1)
    ]
    for number, line in enumerate(lines, start=1):
        if not all(0 <= line.get(name, -1) < MANY for name in ("step", "tokens", "seconds")):
            raise UserError(f"{path} is damaged: line {number} lacks step, tokens or seconds")
    return [repair_surrogates(line) for line in lines]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `samples.jsonl`: `step`, and texts by name, `prompt` among them.

    Raises:
        UserError: a line is anything else.
    """
    path = folder / SAMPLES
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        texts = {name: value for name, value in line.items() if name != "step"}
        if not isinstance(line.get("step"), int) or "prompt" not in texts:
            raise UserError(f"{path} is damaged: line {number} lacks step or prompt")
        _typed(path, number, dict[str, str], texts)
    return [repair_surrogates(line) for line in lines]


def _typed(path: Path, number: int, kind: type[Kind], line: Mapping[str, Any]) -> Kind:
    try:
        return as_type(kind, line)
    except UserError as error:
        raise UserError(f"{path} is damaged: line {number}: {error}") from error


def record_provenance(
    folder: RunFolder,
    accelerator: Accelerator,
    data: DataProvenance,
    config: PreTrainedConfig,
    tokens: int,
    added_tokens: Sequence[str] = (),
) -> None:
    """Write `provenance.json` into the run's folder: data, device, processes, versions, and the code's commit and hash.

    Args:
        tokens: how many the training took, for its operations by `estimate.flops_per_token`.
        added_tokens: tokens that the run gave the model's tokenizer.
    """
    if not folder.is_writer:
        return
    provenance = Provenance(
        splits=data.sizes,
        source=data.source,
        local=[name for name in _named(folder.run) if Path(name).exists()],
        device=device_name(accelerator.device),
        processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
        training_flops=flops_per_token(folder.run, config) * tokens,
        versions=package_versions(),
        commit=_commit(),
        network_code_sha256=network_code_hash() if isinstance(config, FGPTConfig) else None,
        model_type=config.model_type,
        base_license=license_of(model_name(folder.run.start_model)) if folder.run.start_model else None,
        added_tokens=added_tokens,
        started_from=_run_before(folder.run),
    )
    write_json(folder.path / PROVENANCE, provenance.to_json())


def find_run(model: Path) -> Path | None:
    """Return the folder of the run that trained a model, given that folder or the model's own one inside it."""
    return next((folder for folder in (model, *model.resolve().parents[:2]) if (folder / RECORD).is_file()), None)


def _run_before(run: Run) -> RunBefore | None:
    """Return what is recorded of the run that trained the model which this one starts from."""
    folder = find_run(Path(run.start_model)) if run.start_model else None
    if folder is None:
        return None
    provenance, metrics = folder / PROVENANCE, read_metrics(folder)
    return RunBefore(
        run=read_record(folder / RECORD),
        provenance=read_json(provenance) if provenance.is_file() else {},
        last={name: metrics[-1][name] for name in ("step", "tokens", "seconds")} if metrics else {},
    )


def _named(run: Run) -> list[str]:
    """Return the names of the model and the data sets that a run starts from."""
    started_from = [run.start_model] if run.start_model else []
    if isinstance(run, TextSource):
        started_from += [run.tokenizer] if run.tokenizer else []
    if isinstance(run, (TextSource, DatasetOptions)):
        entries = parse_mixture(run.dataset_name) + parse_validation_names(run.validation_dataset)
        return [*started_from, *(entry.name for entry in entries)]
    return started_from


def _commit() -> str | None:
    """Return the commit of the checkout that this code runs from, or None if it is installed or has been changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    questions = (["ls-files", "--error-unmatch", __file__], ["status", "--porcelain", "-uno"], ["rev-parse", "HEAD"])
    try:
        answers = [subprocess.run([*git, *question], capture_output=True, text=True) for question in questions]
    except OSError:  # no git
        return None
    tracked, changes, commit = answers
    is_known = tracked.returncode == 0 and changes.stdout == ""  # untracked: installed inside another checkout
    return commit.stdout.strip() if is_known else None


def record_results(folder: RunFolder, accelerator: Accelerator, results: Sequence[TaskResult]) -> None:
    """Write a run's last benchmark results to `results.json`, if there are any."""
    if folder.is_writer and results:
        settings = {"precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
        record = results_record(results, settings, folder.run.eval_task_limit)
        write_results(folder.path / RESULTS, record.to_json())
