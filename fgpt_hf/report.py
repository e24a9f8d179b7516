"""What a run has come to, for a person."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt_hf.folders import read_lines


def summary(folder: Path) -> str:
    """Losses and samples at the first and the last step, and what the run's folder holds."""
    metrics, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    lines = [
        f"\n{folder}: {metrics[-1]['step']} steps, {metrics[-1]['tokens']:,} tokens, {metrics[-1]['seconds']:.0f} s"
    ]
    measured = [line for line in metrics if "eval_loss" in line]
    if measured:
        first, last = measured[0], measured[-1]
        lines += [
            f"held-out loss        {first['eval_loss']:.3f} -> {last['eval_loss']:.3f} nats per token",
            f"bits per byte        {first['eval_bits_per_byte']:.3f} -> {last['eval_bits_per_byte']:.3f}",
        ]
    lines += _benchmarks(metrics)
    for step in sorted({samples[0]["step"], samples[-1]["step"]} if samples else ()):
        lines += [f"\nafter {step} steps:"]
        lines += [f"  {line['prompt']!r} ... {line['sampled'][:160]!r}" for line in samples if line["step"] == step]
    return "\n".join(lines)


def _benchmarks(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each measure of each benchmark, named `task/measure` in the metrics, with its standard error."""
    measured = [line for line in metrics if any("/" in name for name in line)]
    if not measured:
        return []
    first, last = measured[0], measured[-1]
    names = [name for name in first if "/" in name and f"{name}_stderr" in first]
    return [f"{name:<26} {first[name]:.3f} -> {last[name]:.3f} ± {last[f'{name}_stderr']:.3f}" for name in names]
