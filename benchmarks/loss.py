"""Compare the fused loss with the plain one: time and peak memory of head and loss, forward and backward.

    python benchmarks/loss.py [--tokens 8192] [--width 384]

prints ratios for float32 and, if the hardware supports it, bfloat16. Each measurement runs in its own process, and the
two losses take turns.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from fgpt_hf.losses.linear_cross_entropy import summed_cross_entropy
from fgpt_hf.runtime.hardware import peak_memory_bytes, supports_bf16

CPU = torch.device("cpu")
VOCABULARY = 50304


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="Number of tokens (default: 8192).")
    parser.add_argument("--width", type=int, default=384, help="Width of the hidden states (default: 384).")
    parser.add_argument("--repeats", type=int, default=3, help="Number of rounds (default: 3).")
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "DTYPE"), help="Make one measurement in this process.")
    options = parser.parse_args()
    if options.measure:
        loss, dtype = options.measure
        print(*measure(loss, dtype, options.tokens, options.width))
        return
    for dtype in ("float32", "bfloat16") if supports_bf16(CPU) else ("float32",):
        seconds: dict[str, list[float]] = {"plain": [], "fused": []}
        memory: dict[str, float] = {}
        for _ in range(options.repeats):
            for loss in seconds:
                measured, memory[loss] = in_a_process(loss, dtype, options.tokens, options.width)
                seconds[loss].append(measured)
        medians = {loss: statistics.median(values) for loss, values in seconds.items()}
        print(
            f"{dtype}: plain {medians['plain']:.2f} s, {memory['plain'] / 2**20:,.0f} MiB; "
            f"fused {medians['fused']:.2f} s, {memory['fused'] / 2**20:,.0f} MiB; "
            f"{medians['plain'] / medians['fused']:.2f} times as fast, "
            f"1/{memory['plain'] / memory['fused']:.1f} of the memory"
        )


def in_a_process(loss: str, dtype: str, tokens: int, width: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--measure", loss, dtype, "--tokens", str(tokens), "--width", str(width)]
    seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(memory)


def measure(loss: str, dtype: str, tokens: int, width: int) -> tuple[float, int]:
    """Return the seconds of the second call, and the peak memory minus that before the first."""
    torch.manual_seed(0)
    states = torch.randn(tokens, width, requires_grad=True)
    embeddings = (torch.randn(VOCABULARY, width) * 0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,))
    before = peak_memory_bytes(CPU)
    for _ in range(2):
        states.grad = embeddings.grad = None
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if loss == "fused":
                total = summed_cross_entropy(states, embeddings, labels)
            else:
                total = F.cross_entropy(F.linear(states, embeddings), labels, reduction="sum")
        (total / tokens).backward()
        seconds = time.perf_counter() - began
    return seconds, peak_memory_bytes(CPU) - before


if __name__ == "__main__":
    main()
