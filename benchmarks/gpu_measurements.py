"""The measurements of benchmarks/gpu.py, which runs them in a process that may fail without the others.

They need torch, transformers, accelerate and NumPy alone.

Legend: B rows, T tokens of a row, C width.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data.batch_fields import DOCUMENT_ENDS, document_ends
from fgpt_hf.losses.linear_cross_entropy import summed_cross_entropy
from fgpt_hf.losses.objectives import Batch, LanguageModelObjective
from fgpt_hf.runtime.duration import likely_seconds
from fgpt_hf.runtime.hardware import (
    device_name,
    find_gpu,
    keep_freed_memory,
    peak_memory_bytes,
    product_flops,
    supports_bf16,
    this_machine,
)
from fgpt_hf.runtime.network import network_config
from fgpt_hf.runtime.transfers import to_device
from fgpt_hf.runtime.workload import Workload
from fgpt_hf.training.optim import build_optimizer

Figures = dict[str, Any]  # of a measurement, by name: numbers and words
DOCUMENTS_IN_ROW = 4
ATTENTIONS = ("varlen_attention", "flex_attention", "sdpa")


@dataclass(frozen=True)
class Measurement:
    """A figure to take: its name, the function of this module that takes it, and what that is given."""

    name: str
    function: str
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where and at which size everything is measured."""

    device: torch.device
    tiny: bool

    def run(self, preset: str) -> BaseRun:
        """Return a preset, or its miniature with the same head size."""
        run = PRESETS[preset]
        if not self.tiny:
            return run
        size = run.hidden_size // run.num_attention_heads
        shape: Any = {"hidden_size": 2 * size, "num_attention_heads": 2, "num_hidden_layers": 2}
        rows: Any = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        return replace(run, **shape, **rows, max_position_embeddings=64)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if supports_bf16(self.device) else torch.float32

    @property
    def repeats(self) -> int:
        return 2 if self.tiny else 6

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object]) -> float:
        """Return the median time of an action, after two more of it."""
        times = []
        for _ in range(self.repeats + 2):
            began = time.perf_counter()
            action()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])


def plan(attentions: tuple[str, ...] = ATTENTIONS) -> list[Measurement]:
    """Return everything to measure, what matters most first: the time may not suffice for all of it."""
    flagship = "fgpt-712m"
    measurements = [Measurement("card", "measure_card")]
    for attention in attentions:
        for head_size in (54, 64):
            given = {"attention": attention, "head_size": head_size}
            measurements.append(Measurement(f"error of {attention}, heads of {head_size}", "attention_error", given))
    for preset, attention, compiled, rows in (
        (flagship, "varlen_attention", False, 16),
        (flagship, "sdpa", False, 16),
        (flagship, "varlen_attention", False, 32),
        ("fgpt-124m", "varlen_attention", False, 32),
        ("fgpt-355m", "varlen_attention", False, 32),
        (flagship, "varlen_attention", True, 16),
        (flagship, "flex_attention", True, 16),
        (flagship, "varlen_attention", False, 8),
        ("fgpt-124m", "varlen_attention", True, 32),
        ("fgpt-355m", "varlen_attention", True, 32),
        (flagship, "sdpa", True, 16),
        (flagship, "varlen_attention", True, 32),
        ("fgpt-124m", "varlen_attention", False, 64),
        ("fgpt-355m", "varlen_attention", False, 16),
    ):
        given = {"preset": preset, "attention": attention, "compiled": compiled, "rows": rows}
        name = f"step of {preset}, {attention}{', compiled' if compiled else ''}, {rows} rows"
        measurements.append(Measurement(name, "measure_step", given))
    heads_of_64 = {"preset": flagship, "attention": "varlen_attention", "compiled": False, "rows": 16}
    heads_of_64 |= {"hidden_size": 1280, "num_attention_heads": 20}
    others = [
        Measurement("step of 1280 x 20 heads of 64, varlen_attention, 16 rows", "measure_step", heads_of_64),
        Measurement("loss of fgpt-712m, 16 rows", "measure_loss"),
        Measurement("data of fgpt-712m, 16 rows", "measure_data"),
        Measurement("generation of fgpt-712m", "measure_generation"),
    ]
    return [*measurements[:10], *others, *measurements[10:]]


def measure_card(bench: Bench) -> Figures:
    """Return the rates at which the device multiplies and copies, measured, and the data sheet's peak."""
    rows, width = (256, 64) if bench.tiny else (8192, 2048)
    values = torch.empty(1 << (16 if bench.tiny else 29), device=bench.device)
    copy_seconds = bench.seconds(lambda: values.clone())
    gpu = find_gpu(device_name(bench.device))
    return {
        "device": device_name(bench.device),
        "torch": torch.__version__,
        "matrix_flops": product_flops(bench.device, rows, width, bench.dtype),
        "memory_bytes_per_second": 2 * values.numel() * values.element_size() / copy_seconds,
        "peak_flops": gpu.bf16_teraflops * 1e12 if gpu else None,
    }


def attention_error(bench: Bench, attention: str, head_size: int) -> Figures:
    """Return the errors of states and gradients against eager float32, relative to the largest of each.

    Beside them stands eager attention in the same low precision, whose errors are those of the number format.
    """
    length = 64 if bench.tiny else 1024
    shape: Any = {"hidden_size": 2 * head_size, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 512}
    torch.manual_seed(0)
    with bench.device:
        model = FGPTForCausalLM(FGPTConfig(**shape, max_position_embeddings=length))
    batch = to_device(packed_rows(4, length, vocabulary=512), bench.device)
    figures = {}
    expected = _states_and_gradient(model, batch, "eager", torch.float32)
    for name, kind in (("", attention), ("eager_", "eager")):
        found = _states_and_gradient(model, batch, kind, bench.dtype)
        for what, one, other in zip(("state", "gradient"), found, expected, strict=True):
            figures[f"{name}{what}_error"] = float((one - other).abs().max() / other.abs().max())
    return figures


def _states_and_gradient(
    model: FGPTForCausalLM, batch: Batch, attention: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the gradient of the first projection of the queries."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = LanguageModelObjective(model)(batch)
    loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    return loss.detach().float(), gradient.float().clone()


def measure_step(bench: Bench, preset: str, attention: str, compiled: bool, rows: int, **shape: Any) -> Figures:
    """Return the speed of a preset's steps with micro-batches of so many rows, and the optimizer's share of them."""
    run = bench.run(preset)
    run = run if bench.tiny else replace(run, **shape)
    rows, config = (min(rows, 4) if bench.tiny else rows), network_config(run)
    keep_freed_memory()
    torch.manual_seed(0)
    with bench.device:
        model = FGPTForCausalLM(config).train()
    model.set_attn_implementation(attention)
    if compiled:
        model.get_decoder().compile(backend="aot_eager" if bench.tiny else "inductor")
    objective, optimizer = LanguageModelObjective(model), build_optimizer(model, run)
    batch = to_device(packed_rows(rows, config.max_position_embeddings), bench.device)
    optimizer.skip = torch.zeros((), device=bench.device)

    def pass_through() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype == torch.bfloat16):
            loss = objective(batch) / batch["labels"].numel()
        loss.backward()

    def move() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        optimizer.step()

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    pass_through()
    move()
    bench.synchronize()
    first_seconds = time.perf_counter() - began
    waits = _waits(bench, pass_through, move)
    pass_seconds, move_seconds = bench.seconds(pass_through), bench.seconds(move)
    tokens, passes = rows * config.max_position_embeddings, max(1, run.rows_per_step(1) // rows)
    step_seconds = passes * pass_seconds + move_seconds
    workload = Workload(run, config, this_machine(bench.device))
    speed = passes * tokens / step_seconds
    return {
        "tokens_per_second": speed,
        "flops": workload.flops_per_token * speed,
        "micro_batch_seconds": pass_seconds,
        "optimizer_seconds": move_seconds,
        "optimizer_share": move_seconds / step_seconds,
        "first_step_seconds": first_seconds,
        "waits_for_device": waits,
        "memory_bytes": peak_memory_bytes(bench.device),
        "estimated_memory_bytes": workload.memory(rows, 2).total,
        "estimated_step_seconds": likely_seconds(workload, passes * tokens),
        "step_seconds": step_seconds,
    }


def _waits(bench: Bench, *actions: Callable[[], None]) -> str | None:
    """Return what CUDA says of the first call in a step that waits for the device; "none" if there is no such call."""
    if bench.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for action in actions:
            action()
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def measure_loss(bench: Bench) -> Figures:
    """Return the time of the flagship's head and loss on a micro-batch of 16 rows, forward and backward."""
    config = network_config(bench.run("fgpt-712m"))
    tokens = 64 if bench.tiny else 16 * config.max_position_embeddings
    with bench.device:
        states, embeddings = torch.randn(tokens, config.hidden_size), torch.randn(config.vocab_size, config.hidden_size)
        labels = torch.randint(config.vocab_size, (tokens,))
    states.requires_grad_()
    embeddings.requires_grad_()

    def pass_through() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype == torch.bfloat16):
            summed_cross_entropy(states, embeddings, labels).backward()

    return {"seconds": bench.seconds(pass_through)}


def measure_data(bench: Bench) -> Figures:
    """Return the time to make a micro-batch of 16 rows of ids, and to hand it to the device."""
    length = bench.run("fgpt-712m").max_position_embeddings
    return {"seconds": bench.seconds(lambda: to_device(packed_rows(16, length), bench.device))}


def measure_generation(bench: Bench) -> Figures:
    """Return the tokens per second of a greedy reply, one at a time, and the weights that each token reads."""
    run = bench.run("fgpt-712m")
    with bench.device:
        model: Any = FGPTForCausalLM(network_config(run)).eval()
    model.to(bench.dtype)
    ids, new = torch.full((1, 16), 7, device=bench.device), 8 if bench.tiny else 128
    options: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def seconds_of(tokens: int) -> float:
        def write() -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)

        return replace(bench, tiny=True).seconds(write)  # which needs few repeats

    rate = (new - 1) / (seconds_of(new) - seconds_of(1))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"tokens_per_second": rate, "weight_bytes": weights}


def packed_rows(rows: int, length: int, vocabulary: int = 50_000) -> dict[str, Tensor]:
    """Return random rows of `DOCUMENTS_IN_ROW` documents of unlike lengths, as a batch."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=random)
    starts = torch.randint(1, length, (rows, DOCUMENTS_IN_ROW - 1), generator=random)
    is_start = torch.zeros(rows, length, dtype=torch.bool).scatter_(1, starts, True)
    offsets = torch.arange(length).expand(rows, length)
    positions = offsets - torch.where(is_start, offsets, 0).cummax(dim=1).values
    ends = document_ends(positions, torch.zeros_like(is_start))
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone(), DOCUMENT_ENDS: ends}


def main() -> None:
    """Take the measurements from the given number on; print the figures of each in a line of JSON."""
    device, tiny, first = sys.argv[1], sys.argv[2] == "tiny", int(sys.argv[3])
    bench = Bench(torch.device(device), tiny)
    for number, measurement in enumerate(plan()[first:], start=first):
        began = time.perf_counter()
        try:
            figures = globals()[measurement.function](bench, **measurement.given)
        except Exception as error:  # whatever a variant does wrong, the others are to be measured
            figures = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        line = {"number": number, "name": measurement.name, **measurement.given, **figures}
        print(json.dumps({**line, "took_seconds": time.perf_counter() - began}), flush=True)
        torch._dynamo.reset()
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
