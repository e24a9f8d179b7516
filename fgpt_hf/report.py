"""What a run has come to, for a person."""

from pathlib import Path

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
    for step in sorted({samples[0]["step"], samples[-1]["step"]} if samples else ()):
        lines += [f"\nafter {step} steps:"]
        lines += [f"  {line['prompt']!r} ... {line['sampled'][:160]!r}" for line in samples if line["step"] == step]
    return "\n".join(lines)
