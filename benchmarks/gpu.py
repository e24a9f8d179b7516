"""Measure the flagship's training step on this GPU: tokens per second, fraction of the peak, memory.

    python benchmarks/gpu.py

trains a preset on random rows with the parts of the training loop, eager and compiled, each in its own process. Before
that, it measures the error of PyTorch's fused attention at the preset's head size on packed documents. No data set is
needed. `--preset quickstart` also runs on a CPU.
"""

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses.objectives import Batch, LanguageModelObjective
from fgpt_hf.runtime.estimate import memory, mfu, network
from fgpt_hf.runtime.hardware import device_name, keep_freed_memory, peak_memory_bytes, supports_bf16, this_machine
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID
from fgpt_hf.training.optim import build_optimizer

MODES = ("eager", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="fgpt-712m", help="Preset to train (default: fgpt-712m).")
    parser.add_argument("--rows", type=int, help="Rows per micro-batch (default: the preset's).")
    parser.add_argument("--steps", type=int, default=10, help="Number of measured steps (default: 10).")
    parser.add_argument("--measure", choices=MODES, help="Make one measurement in this process.")
    options = parser.parse_args()
    run = PRESETS[options.preset]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    rows = run.per_device_train_batch_size if options.rows is None else options.rows
    if rows < 1 or options.steps < 1:
        parser.error(f"--rows {rows} and --steps {options.steps} must be above zero")
    if device.type == "cpu" and options.preset != "quickstart":
        print("skipped: there is no GPU; --preset quickstart runs on this CPU")
        return
    if options.measure:
        measure(run, device, rows, options.steps, options.measure == "compiled")
        return
    expected = memory(run, network(run), this_machine(device), rows, 1).total
    print(f"{device_name(device)}, {options.preset}, micro-batches of {rows} rows: expected {expected / 1e9:.1f} GB")
    print(
        f"error relative to the largest state: fused attention {attention_error(run, device):.1e}, "
        f"eager attention in the same precision {attention_error(run, device, 'eager'):.1e}"
    )
    for mode in MODES:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", mode]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{mode:10} {done.stdout.strip() or f'exit code {done.returncode}: {done.stderr.strip()[-300:]}'}")


def measure(run: BaseRun, device: torch.device, rows: int, steps: int, compiled: bool) -> None:
    """Print the figures of the median step with one micro-batch, clipping and the optimizer."""
    keep_freed_memory()
    torch.manual_seed(0)
    config = network(run)
    with device:
        model = FGPTForCausalLM(config).train()
    if compiled:
        model.get_decoder().compile()
    objective, optimizer = LanguageModelObjective(model), build_optimizer(model, run)
    batch, seconds = packed_rows(rows, config.max_position_embeddings, device), []
    for _ in range(steps + 3):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=supports_bf16(device)):
            loss = objective(batch) / objective.num_items(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # wait for the device
        seconds.append(time.perf_counter() - began)
    speed = rows * config.max_position_embeddings / statistics.median(seconds[3:])
    share = mfu(run, config, speed, this_machine(device))
    known = "" if share is None else f", {share:.1%} of the peak"
    print(f"{speed:,.0f} tokens/s{known}, {peak_memory_bytes(device) / 1e9:.1f} GB")


@torch.no_grad()
def attention_error(run: BaseRun, device: torch.device, attention: str = "sdpa") -> float:
    """Return the largest error of the final states against eager float32, relative to the largest state."""
    torch.manual_seed(0)
    with device:
        model = FGPTForCausalLM(network(run)).eval().get_decoder()
    batch = packed_rows(1, run.max_position_embeddings, device)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    states = []
    for implementation, low in (("eager", False), (attention, supports_bf16(device))):
        model.set_attn_implementation(implementation)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            states.append(model(**inputs, use_cache=False).last_hidden_state.float())
    return float((states[1] - states[0]).abs().max() / states[0].abs().max())


def packed_rows(rows: int, length: int, device: torch.device) -> Batch:
    """Return random rows of about four documents each."""
    ids = np.random.default_rng(0).integers(0, 50_000, (rows, length)).astype(np.uint16)
    ids[:, :: length // 4 + 1] = END_OF_TEXT_ID
    return {name: tensor.to(device) for name, tensor in as_batch(ids).items()}


if __name__ == "__main__":
    main()
