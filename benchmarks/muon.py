"""Measure what Muon takes of a training step, against torch's own Muon and against AdamW, in turn in one process.

    python benchmarks/muon.py

prints the seconds of the optimizer and its share of the step at 6 layers of width 384 and 8 rows of 256 tokens.
"""

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.runtime.hardware import device_name, keep_freed_memory, supports_bf16
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID
from fgpt_hf.training.optim import JointOptimizer, build_optimizer

CPU = torch.device("cpu")
LAYERS, WIDTH, HEADS, ROWS, LENGTH = 6, 384, 6, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Number of steps of each (default: 5).")
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    torch.manual_seed(0)
    config = FGPTConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=LENGTH
    )
    model = FGPTForCausalLM(config).train()
    objective, optimizers = LanguageModelObjective(model), contenders(model)
    ids = np.random.default_rng(0).integers(0, 50_000, (ROWS, LENGTH)).astype(np.uint16)
    ids[:, 0] = END_OF_TEXT_ID
    batch = as_batch(ids)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for _ in range(rounds + 1):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=supports_bf16(CPU)):
                loss = objective(batch) / objective.num_items(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            computed = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append((computed - began, time.perf_counter() - computed))
    print(f"{device_name(CPU)}, {torch.get_num_threads()} threads")
    for name, measured in seconds.items():
        passes, moved = (statistics.median(times) for times in zip(*measured[1:], strict=True))
        print(f"{name:13} {moved:6.3f} s, {moved / (passes + moved):.0%} of a step of {passes + moved:.3f} s")


def contenders(model: FGPTForCausalLM) -> dict[str, JointOptimizer]:
    """Return optimizers of one model, by name."""
    run = PRESETS["quickstart"]
    ours, adamw = build_optimizer(model, run), build_optimizer(model, replace(run, optim="adamw"))
    matrices = [parameter for group in ours.optimizers[0].param_groups for parameter in group["params"]]
    theirs = torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    return {"adamw": adamw, "torch's Muon": JointOptimizer([theirs, ours.optimizers[1]]), "this project": ours}


if __name__ == "__main__":
    main()
