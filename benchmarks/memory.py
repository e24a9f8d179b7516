"""Compare the memory that `fgpt estimate` predicts with what a training process takes.

    python benchmarks/memory.py

prints both and their ratio for several shapes, each in its own process: the peak resident set of a few steps of the
loop's own parts, minus the resident set before the model is created.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import numpy as np
import psutil
import torch

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, PreferenceRun, Run, TuningRun
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses.objectives import (
    Batch,
    LanguageModelObjective,
    Objective,
    PreferenceLossConfig,
    PreferenceObjective,
)
from fgpt_hf.model.lora import add_adapter
from fgpt_hf.runtime.hardware import keep_freed_memory, peak_memory_bytes, supports_bf16, this_machine
from fgpt_hf.runtime.network import network_config
from fgpt_hf.runtime.workload import Workload
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, build_tokenizer
from fgpt_hf.training.optim import build_optimizer


class Case(NamedTuple):
    """A run, and the shape of its network."""

    run: Run
    config: FGPTConfig


def base(run: BaseRun) -> Case:
    return Case(run, network_config(run))


def tuned(run: TuningRun, shape: BaseRun) -> Case:
    """Return the tuning run with the shape, the rows per step and the precision of a base run."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "gradient_checkpointing")
    return Case(replace(run, **{name: getattr(shape, name) for name in names}), network_config(shape))


CPU = torch.device("cpu")
SMALL = replace(PRESETS["quickstart"], bf16=True)
WIDE = replace(SMALL, num_hidden_layers=8, hidden_size=512, num_attention_heads=8, max_position_embeddings=512)
FLAT = replace(SMALL, num_hidden_layers=4, hidden_size=384, num_attention_heads=6, optim="adamw")
HALVES = replace(WIDE, bf16=False, per_device_train_batch_size=4, gradient_accumulation_steps=2)
LORA = replace(INSTRUCT_PRESETS["quickstart"], use_peft=True)
PAIRS = PREFERENCE_PRESETS["quickstart"]
CASES: dict[str, Case] = {
    "6 x 256, 8 rows of 256, bf16": base(SMALL),
    "6 x 256, 32 rows of 256, bf16": base(replace(SMALL, per_device_train_batch_size=32)),
    "6 x 256, 8 rows of 256, fp32": base(replace(SMALL, bf16=False)),
    "8 x 512, 8 rows of 512, bf16": base(WIDE),
    "4 x 384, 16 rows of 256, bf16, AdamW": base(replace(FLAT, per_device_train_batch_size=16)),
    "8 x 512, 2 x 4 rows of 512, fp32": base(HALVES),
    "8 x 512, 8 rows of 512, bf16, LoRA": tuned(LORA, WIDE),
    "8 x 512, 2 x 4 rows of 512, fp32, LoRA": tuned(LORA, HALVES),
    "8 x 512, 1 row of 512, fp32, LoRA": tuned(LORA, replace(WIDE, bf16=False, per_device_train_batch_size=1)),
    "8 x 512, 4 pairs of 512, bf16": tuned(PAIRS, replace(WIDE, per_device_train_batch_size=4)),
    "8 x 512, 4 pairs of 512, fp32, LoRA": tuned(
        replace(PAIRS, use_peft=True), replace(WIDE, bf16=False, per_device_train_batch_size=4)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=CASES, help="Make one measurement in this process.")
    options = parser.parse_args()
    if options.measure:
        print(measure(CASES[options.measure]))
        return
    for name, case in CASES.items():
        if case.run.bf16 and not supports_bf16(CPU):
            print(f"{name:38} skipped: this CPU has no bfloat16 arithmetic")
            continue
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured, expected = int(done.stdout), expect(case)
        figures = f"expected {expected / 1e6:6,.0f} MB, measured {measured / 1e6:6,.0f} MB"
        print(f"{name:38} {figures}: {expected / measured:.2f}")


def expect(case: Case) -> int:
    """Return the estimated number of bytes."""
    run, config = case
    rows, micro_batches = run.per_device_train_batch_size, run.gradient_accumulation_steps
    return Workload(run, config, this_machine(CPU)).memory(rows, micro_batches).total


def measure(case: Case, steps: int = 3) -> int:
    """Return the number of additional bytes that the process takes."""
    run, config = case
    keep_freed_memory()
    batch = random_batch(run, config.max_position_embeddings)
    import_module("peft")  # now, because imports by the first adapter are not part of the run
    before = psutil.Process().memory_info().rss
    objective = new_objective(run, config)
    optimizer = build_optimizer(objective.model, run)
    for _ in range(steps):
        for _ in range(run.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(run.bf16)):
                (objective(batch).reshape(-1)[0] / objective.num_items(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak_memory_bytes(CPU) - before


def random_batch(run: Run, length: int) -> Batch:
    """Return a micro-batch of rows of four documents each, or of pairs with all tokens scored."""
    shape = (run.per_device_train_batch_size * run.sequences_per_row, length)
    ids = np.random.default_rng(0).integers(0, 50_000, shape).astype(np.uint16)
    if not isinstance(run, PreferenceRun):
        ids[:, :: length // 4] = END_OF_TEXT_ID
        return as_batch(ids)
    pairs = torch.from_numpy(ids.astype(np.int64)).unflatten(0, (-1, 2))
    return {"input_ids": pairs, "labels": pairs, "reference": torch.zeros(len(pairs), 2)}


def new_objective(run: Run, config: FGPTConfig) -> Objective:
    """Return the run's objective on a new network, with an adapter if the run asks for one."""
    model = FGPTForCausalLM(config).train()
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if isinstance(run, TuningRun) and run.use_peft:
        add_adapter(model, run, build_tokenizer())
    return (
        PreferenceObjective(model, PreferenceLossConfig())
        if isinstance(run, PreferenceRun)
        else LanguageModelObjective(model)
    )


if __name__ == "__main__":
    main()
