"""The memory that `fgpt estimate` expects of a training run against what the process then takes.

`python benchmarks/memory.py` prints both and their ratio for several shapes, each in a process of its own. What is
measured is the peak resident set of a few steps of the loop's own parts, less what the process held before there was a
model.
"""

import argparse
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import torch

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.batches import as_batch
from fgpt_hf.devices import this_machine
from fgpt_hf.estimate import memory, network
from fgpt_hf.hardware import keep_freed_memory, peak_memory_bytes, supports_bf16
from fgpt_hf.objectives import LanguageModelObjective
from fgpt_hf.optim import build_optimizer
from fgpt_hf.presets import PRESETS
from fgpt_hf.runs import BaseRun
from fgpt_hf.tokenizer import END_OF_TEXT_ID

CPU = torch.device("cpu")
SMALL = replace(PRESETS["quickstart"], bf16=True)
WIDE = replace(SMALL, num_hidden_layers=8, hidden_size=512, num_attention_heads=8, max_position_embeddings=512)
FLAT = replace(SMALL, num_hidden_layers=4, hidden_size=384, num_attention_heads=6, optim="adamw")
CASES: dict[str, BaseRun] = {
    "6 x 256, 8 rows of 256, bf16": SMALL,
    "6 x 256, 32 rows of 256, bf16": replace(SMALL, per_device_train_batch_size=32),
    "6 x 256, 8 rows of 256, fp32": replace(SMALL, bf16=False),
    "8 x 512, 8 rows of 512, bf16": WIDE,
    "4 x 384, 16 rows of 256, bf16, AdamW": replace(FLAT, per_device_train_batch_size=16),
    "8 x 512, 2 x 4 rows of 512, fp32": replace(
        WIDE, bf16=False, per_device_train_batch_size=4, gradient_accumulation_steps=2
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=CASES, help="one measurement, in this process")
    options = parser.parse_args()
    if options.measure:
        print(measure(CASES[options.measure]))
        return
    for name, run in CASES.items():
        if run.bf16 and not supports_bf16(CPU):
            print(f"{name:36} left out: this CPU has no bfloat16 arithmetic")
            continue
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured, expected = int(done.stdout), expect(run)
        figures = f"expected {expected / 1e6:6,.0f} MB, measured {measured / 1e6:6,.0f} MB"
        print(f"{name:36} {figures}: {expected / measured:.2f}")


def expect(run: BaseRun) -> int:
    """Bytes that the estimate gives."""
    rows, micro_batches = run.per_device_train_batch_size, run.gradient_accumulation_steps
    return memory(run, network(run), this_machine(CPU), rows, micro_batches).total


def measure(run: BaseRun, steps: int = 3) -> int:
    """Bytes that the process takes beyond those that it held before."""
    keep_freed_memory()
    length = run.max_position_embeddings
    ids = np.random.default_rng(0).integers(0, 50_000, (run.per_device_train_batch_size, length)).astype(np.uint16)
    ids[:, :: length // 4] = END_OF_TEXT_ID
    batch = as_batch(ids)
    before = psutil.Process().memory_info().rss
    objective = LanguageModelObjective(FGPTForCausalLM(network(run)))
    optimizer = build_optimizer(objective.model, run)
    for _ in range(steps):
        for _ in range(run.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(run.bf16)):
                (objective(batch) / objective.weight(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak_memory_bytes(CPU) - before


if __name__ == "__main__":
    main()
