"""The one loop: it is handed a model, an objective, batches and checks, and knows no corpus and no metric."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import send_to_device, set_seed
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from fgpt_hf.batches import Batches
from fgpt_hf.checkpoints import Progress, TrainingState, checkpoint_to_resume, save_model
from fgpt_hf.devices import this_machine
from fgpt_hf.estimate import mfu
from fgpt_hf.folders import RunFolder, whole_folder
from fgpt_hf.hardware import keep_freed_memory, peak_memory_bytes, supports_bf16
from fgpt_hf.objectives import Objective
from fgpt_hf.optim import build_optimizer, learning_rate_factor
from fgpt_hf.runs import Run
from fgpt_hf.shortage import smaller


class Check(NamedTuple):
    """Something to look at before the first step, every so many and after the last: `run(step)` says what to log."""

    every_steps: int
    run: Callable[[int], dict[str, float]]


def start(run: Run) -> Accelerator:
    """The processes and the device of a run, in the precision that it asks for, with its seed set.

    Raises:
        ValueError: the device lacks that precision, a tracker is not installed, the processes do not find each other.
    """
    cpu = not torch.accelerator.is_available()  # Accelerate starts several processes on CPUs only when told
    try:
        device = PartialState(cpu, timeout=timedelta(minutes=10)).device
    except DistError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise ValueError(
            f"the processes cannot meet at {address}:{port}: is the port in use? Give another one "
            "(accelerate launch --main_process_port, torchrun --master_port)"
        ) from error
    if run.bf16 and not supports_bf16(device):
        raise ValueError(f"bf16=true: this {device.type} has no bfloat16 arithmetic; leave the flag out or try --fp16")
    if run.fp16 and device.type != "cuda":
        raise ValueError(f"fp16=true needs a CUDA GPU and this is a {device.type}; leave the flag out")
    bf16 = supports_bf16(device) and not run.fp16 if run.bf16 is None else run.bf16
    if run.report_to != "none" and find_spec(run.report_to) is None:
        raise ValueError(f"report_to={run.report_to} is not installed: pip install {run.report_to}, or leave it out")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if bf16 else "fp16" if run.fp16 else "no",
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.folder,
    )
    if device.type == "cpu":
        keep_freed_memory()
    set_seed(run.seed)
    return accelerator


def fit(
    accelerator: Accelerator,
    run: Run,
    folder: RunFolder,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    checks: Sequence[Check] = (),
    on_checkpoint: Callable[[Path], None] = lambda checkpoint: None,
) -> TrainingState:
    """Train `objective.model` up to `run.max_steps` and leave it in `folder.model`.

    The losses of a step are summed over micro-batches and processes and divided by their total weight, so it does not
    matter how its rows are divided. `on_checkpoint` is called with every checkpoint that was written. SIGTERM and
    SIGINT let the step end, save a checkpoint and return early.

    Raises:
        ValueError: nothing to resume from; no finite gradient for `run.max_bad_steps` steps in a row.
        OSError: the model could not be written.
    """
    forward, state = _prepare(accelerator, run, objective, tokenizer, batches)
    if run.resume_from_checkpoint:
        state.restore(checkpoint_to_resume(run, folder.checkpoints, accelerator.print))
        folder.forget_after(state.progress.step)
    folder.begin()
    if run.report_to != "none":
        accelerator.init_trackers(run.preset, {name: value for name, value in asdict(run).items() if value is not None})
    with _stop_signals() as stop_requested:
        _Loop(run, folder, forward, state, checks, on_checkpoint).go(stop_requested)
    if state.progress.step < run.max_steps:
        accelerator.print(f"stopped after step {state.progress.step}: go on with --resume_from_checkpoint latest")
    else:
        weights = state.weights()
        if accelerator.is_main_process:
            with whole_folder(folder.model) as new_folder:
                save_model(state.model, tokenizer, new_folder, weights)
        memory = peak_memory_bytes(accelerator.device) / 2**30
        accelerator.print(f"done in {state.progress.seconds:,.0f} s of training; peak memory {memory:.2f} GiB")
    accelerator.wait_for_everyone()
    return state


def _prepare(
    accelerator: Accelerator,
    run: Run,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
) -> tuple[nn.Module, TrainingState]:
    """The objective as the processes share it, and the state of the run at its beginning."""
    model = objective.model.train()
    model.set_attn_implementation(_attention(run, accelerator))
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if run.torch_compile:
        model.get_decoder().compile()  # in place, so that names and classes stay as they are
    forward = _shard(objective, accelerator) if run.fsdp else accelerator.prepare_model(objective)
    optimizer = build_optimizer(model, run)
    return forward, TrainingState(accelerator, objective, tokenizer, optimizer, batches, Progress())


def _shard(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """Share the objective's parameters, gradients and optimizer state among all processes, layer by layer (FSDP2)."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    objective.to(accelerator.device)
    for layer in objective.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "examine")
    return objective


def _attention(run: Run, accelerator: Accelerator) -> str:
    if run.attn_implementation != "auto":
        return run.attn_implementation
    if accelerator.device.type == "cuda" and accelerator.mixed_precision != "no":
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


class _Step(NamedTuple):
    """What one step gave: its mean loss, the norm of its gradient, and whether the run was asked to stop."""

    loss: float
    grad_norm: float
    weight: float
    stop: bool

    @property
    def flaw(self) -> str | None:
        """Why the weights were left as they were, if they were."""
        if self.weight == 0:
            return "no token of it is scored"
        return None if math.isfinite(self.grad_norm) else f"its gradient is not finite (norm {self.grad_norm})"


class _Loop:
    """The steps from where a run stands to where it ends, and what is logged, checked and saved on the way."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        forward: nn.Module,
        state: TrainingState,
        checks: Sequence[Check],
        on_checkpoint: Callable[[Path], None],
    ) -> None:
        self.run, self.folder, self.forward, self.state = run, folder, forward, state
        self.checks, self.on_checkpoint = checks, on_checkpoint
        self.accelerator, self.progress = state.accelerator, state.progress
        self.optimizer = state.accelerator.prepare_optimizer(state.optimizer)  # the same one, with the loss scaler
        self.machine = this_machine(self.accelerator.device, self.accelerator.num_processes)
        self.data_seconds = 0.0
        self.logged_at = (self.progress.tokens, self.progress.seconds, self.data_seconds)

    def go(self, stop_requested: Callable[[], bool]) -> None:
        run, progress = self.run, self.progress
        with tqdm(total=run.max_steps, initial=progress.step, unit="step", disable=not self.folder.is_writer) as bar:
            if progress.step == 0:
                self._write(self._checked())
            while progress.step < run.max_steps:
                step = self._next_step(stop_requested)
                self._account_for(step)
                measured = self._measured(step) if self._is_due(run.logging_steps) else {}
                self._write(measured | self._checked())
                bar.update()
                if measured:
                    share = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
                    bar.set_postfix_str(f"loss {step.loss:.3f}, {measured['tokens_per_second']:,.0f} tokens/s{share}")
                if self._is_due(run.save_steps) or step.stop:
                    self._save()
                if step.stop:
                    return

    def _next_step(self, stop_requested: Callable[[], bool]) -> _Step:
        """Take the rows of a step, train on them, and add up the time of both."""
        began = time.perf_counter()
        run, progress = self.run, self.progress
        micro_batches = [
            self.state.batches.take(run.per_device_train_batch_size) for _ in range(run.gradient_accumulation_steps)
        ]
        self.data_seconds += time.perf_counter() - began
        factor = learning_rate_factor(
            run.lr_scheduler_type, progress.step, run.max_steps, run.warmup_steps, run.min_lr_ratio
        )
        self.state.optimizer.set_learning_rate(run.learning_rate * factor)
        step = self._train(micro_batches, stop_requested())
        if progress.step == 0:
            since_start = time.time() - psutil.Process().create_time()
            self.accelerator.print(f"first training step done {since_start:.1f} s after the start")
        progress.step += 1
        progress.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        progress.seconds += time.perf_counter() - began
        return step

    def _train(self, micro_batches: Sequence[Mapping[str, Tensor]], stop_requested: bool) -> _Step:
        """Sum the losses of all micro-batches and processes, divide by their weight, and move the weights once."""
        accelerator, objective = self.accelerator, self.state.objective
        weight, stops = self._summed(
            sum(float(objective.weight(batch)) for batch in micro_batches), float(stop_requested)
        )
        loss = self._gradients(micro_batches, max(weight, 1.0))
        while loss is None:
            self.optimizer.zero_grad()
            micro_batches = smaller(micro_batches, self.run, accelerator)
            self.folder.record_run()
            loss = self._gradients(micro_batches, max(weight, 1.0))
        grad_norm = accelerator.clip_grad_norm_(self.forward.parameters(), self.run.max_grad_norm)
        (mean_loss,) = self._summed(loss.item())
        step = _Step(mean_loss, float(grad_norm), weight, stops > 0)
        if step.flaw is None or accelerator.scaler is not None:  # a scaler skips the step by itself, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad()
        return step

    def _gradients(self, micro_batches: Sequence[Mapping[str, Tensor]], weight: float) -> Tensor | None:
        """Add up the gradients of this process's losses over `weight`, and the losses; None if the memory is short."""
        accelerator = self.accelerator
        loss = torch.zeros((), device=accelerator.device)
        try:
            for number, batch in enumerate(micro_batches, start=1):
                with self._synchronised(number == len(micro_batches)), accelerator.autocast():
                    share = self.forward(send_to_device(batch, accelerator.device)) / weight
                    # Gradients are averaged over the processes, and their sum is wanted.
                    accelerator.backward(share * accelerator.num_processes)
                loss += share.detach()
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None  # what the failed pass holds goes with its traceback
        return loss

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients among processes after the last micro-batch only."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
        return nullcontext() if last else self.accelerator.no_sync(self.forward)

    def _summed(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        return self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        ).tolist()

    def _account_for(self, step: _Step) -> None:
        """Count a step that left the weights as they were, and give up after too many in a row."""
        progress, run = self.progress, self.run
        if step.flaw is None:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        self.accelerator.print(f"step {progress.step} is skipped: {step.flaw}")
        if progress.skipped_in_a_row >= run.max_bad_steps:
            raise ValueError(
                f"no step of the last {run.max_bad_steps} could be used: {step.flaw}. Try a lower learning_rate and "
                f"resume from a checkpoint in {self.folder.checkpoints} (--resume_from_checkpoint latest)"
            )

    def _measured(self, step: _Step) -> dict[str, float]:
        """What `metrics.jsonl` says of a step, and of the time since the last line."""
        progress = self.progress
        now = (progress.tokens, progress.seconds, self.data_seconds)
        tokens, seconds, waited = (new - old for new, old in zip(now, self.logged_at, strict=True))
        self.logged_at = now
        share_of_peak = mfu(self.state.model.config, tokens / seconds, self.machine)  # type: ignore[arg-type]
        return {
            "loss": step.loss,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "grad_norm": step.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "tokens_per_second": tokens / seconds,
            **({} if share_of_peak is None else {"mfu": share_of_peak}),
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
        }

    def _checked(self) -> dict[str, float]:
        """The results of the checks that are due, on a model that does not learn from them."""
        results: dict[str, float] = {}
        self.state.model.eval()
        for check in self.checks:
            if self.progress.step == 0 or self._is_due(check.every_steps):
                # A check changes nothing in the run, not even its random numbers.
                with torch.random.fork_rng():
                    results |= self.state.objective.examine(partial(check.run, self.progress.step))
        self.state.model.train()
        return results

    def _is_due(self, every_steps: int) -> bool:
        return self.progress.step % every_steps == 0 or self.progress.step == self.run.max_steps

    def _write(self, measured: Mapping[str, float]) -> None:
        if measured:
            progress = self.progress
            place = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
            self.folder.append("metrics.jsonl", {**place, **measured})
            self.accelerator.log({**place, **measured}, step=progress.step)

    def _save(self) -> None:
        try:
            self.on_checkpoint(self.state.save(self.folder.checkpoints, self.run.save_total_limit))
        except OSError as error:
            print(f"no checkpoint of step {self.progress.step}, the earlier ones are whole: {error}")


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is noted for the loop to see, and a second one acts as ever."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
