"""Compare a training step of FGPT with one of `GPT2LMHeadModel` and its own loss, at the same shape and precision.

    python benchmarks/training.py

prints tokens per second and peak memory of each, and the ratios. Each measurement runs in its own process; they take
turns, and medians are compared. Both use AdamW; FGPT's step is that of its training loop. The first line gives the
tokens per second that the cores would reach if they only multiplied matrices at their peak rate.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses.objectives import Batch, LanguageModelObjective
from fgpt_hf.runtime.hardware import device_name, keep_freed_memory, peak_memory_bytes, supports_bf16
from fgpt_hf.runtime.network import flops_per_token
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID
from fgpt_hf.training.optim import JointOptimizer, build_optimizer

CPU = torch.device("cpu")
LAYERS, WIDTH, HEADS, ROWS, LENGTH, VOCABULARY = 6, 384, 6, 8, 256, 50304
CONFIG = FGPTConfig(
    num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=LENGTH
)
Contender: TypeAlias = tuple[Callable[[Batch], Tensor], nn.Module, torch.optim.Optimizer | JointOptimizer]
CONTENDERS = ("gpt2", "gpt2-compiled", "fgpt", "fgpt-compiled", "fgpt-muon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="Precision (default: as the training loop chooses)."
    )
    parser.add_argument("--steps", type=int, default=6, help="Number of measured steps (default: 6).")
    parser.add_argument("--repeats", type=int, default=3, help="Number of rounds (default: 3).")
    parser.add_argument("--measure", choices=CONTENDERS, help="Make one measurement in this process.")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if supports_bf16(CPU) else "float32")
    if options.measure:
        print(*measure(options.measure, options.dtype, options.steps))
        return
    rate = matrix_rate(options.dtype)
    print(
        f"{device_name(CPU)}: {rate / 1e9:,.0f} GFLOP/s in {options.dtype} at its peak, "
        f"which would allow {rate / flops_per_token(PRESETS['quickstart'], CONFIG):,.0f} tokens/s"
    )
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, float] = {}
    for _ in range(options.repeats):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--measure", name, "--dtype", options.dtype]
            done = subprocess.run([*command, "--steps", str(options.steps)], check=True, capture_output=True, text=True)
            speed, memory[name] = map(float, done.stdout.split())
            speeds[name].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name in CONTENDERS:
        print(
            f"{name:14} {medians[name]:7,.0f} tokens/s, {medians[name] / medians['gpt2']:.2f} of gpt2's speed, "
            f"{medians[name] / medians['gpt2-compiled']:.2f} of gpt2-compiled's; "
            f"{memory[name] / 2**20:,.0f} MiB, {memory[name] / memory['gpt2']:.2f} of gpt2's memory"
        )


def matrix_rate(dtype: str) -> float:
    """Return the operations per second of the fastest of ten products of square matrices in a linear layer."""
    left, right = torch.randn(2, 2048, 2048).to(getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def measure(name: str, dtype: str, steps: int) -> tuple[float, int]:
    """Return the tokens per second of the median step, and the peak memory of the process."""
    torch.manual_seed(0)
    loss_of, model, optimizer = gpt2(name) if name.startswith("gpt2") else fgpt(name)
    ids = np.random.default_rng(0).integers(0, 50_000, (ROWS, LENGTH)).astype(np.uint16)
    ids[:, 0] = END_OF_TEXT_ID
    batch = as_batch(ids)
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return ROWS * LENGTH / statistics.median(seconds[2:]), peak_memory_bytes(CPU)


def gpt2(name: str) -> Contender:
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=LENGTH, vocab_size=VOCABULARY)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    if name == "gpt2-compiled":
        model.compile()

    def loss_of(batch: Batch) -> Tensor:
        loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        return loss

    return loss_of, model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def fgpt(name: str) -> Contender:
    keep_freed_memory()
    model = FGPTForCausalLM(CONFIG)
    if name == "fgpt-compiled":
        model.get_decoder().compile()
    objective = LanguageModelObjective(model)

    def loss_of(batch: Batch) -> Tensor:
        loss: Tensor = objective(batch) / objective.num_items(batch)
        return loss

    run = replace(PRESETS["quickstart"], optim="muon" if name == "fgpt-muon" else "adamw")
    return loss_of, model, build_optimizer(model, run)


if __name__ == "__main__":
    main()
