"""Measure this GPU and the flagship's training on it, in at most five minutes, with a JSON file and a table.

    PYTHONPATH=. python benchmarks/gpu.py

needs torch, transformers, accelerate and NumPy, and no dataset. It measures the card's matrix rate and memory rate;
the errors of each attention on packed rows against float32, at head sizes 54 and 64; steps of the flagship, and of the
124M and 355M presets, by attention, compilation and micro-batch, with their share of the measured matrix rate and of
the data sheet's peak, the optimizer's share, memory, and whether a step waits for the device; the loss and the data;
the flagship's cousin with heads of 64; generation against the memory's limit; and the estimates against all of that.

What fails is noted, and the rest goes on. `--device cpu --tiny` tries the benchmark itself on miniatures.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_measurements import plan  # noqa: E402  # where this file runs as a script

Line = dict[str, Any]  # the figures of a measurement, by name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="Time for all of it (default: 5).")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Device (default: cuda).")
    parser.add_argument("--tiny", action="store_true", help="Measure miniatures, to try the benchmark itself.")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON file (default: gpu.json).")
    parser.add_argument("--last", type=int, help="Stop after so many measurements (default: all).")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g} must be above zero")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU: --device cpu --tiny tries the benchmark itself")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the presets are too large for it")
    if not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    ends_at = time.monotonic() + 60 * options.minutes
    lines = list(measured(options.device, options.tiny, ends_at, options.last))
    options.output.write_text(json.dumps(with_shares(lines), indent=1) + "\n", encoding="utf-8")
    print(table(with_shares(lines)))


def measured(device: str, tiny: bool, ends_at: float, last: int | None = None) -> Iterator[Line]:
    """Yield the figures of each measurement, taken by a process that is started anew after one that ended it."""
    names = [measurement.name for measurement in plan()][:last]
    number = 0
    while number < len(names) and (left := ends_at - time.monotonic()) > 0:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_measurements",
            device,
            "tiny" if tiny else "whole",
            str(number),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        timer = Timer(left, process.kill)
        timer.start()
        assert process.stdout is not None and process.stderr is not None
        for text in process.stdout:
            if not text.startswith("{"):
                continue  # what a library prints
            yield json.loads(text)
            number += 1
            if number == len(names):
                process.kill()
        said = process.stderr.read().strip().splitlines()
        process.wait()
        timer.cancel()
        if number < len(names) and time.monotonic() < ends_at:
            reason = said[-1][:300] if said else f"exit code {process.returncode}"
            yield {"number": number, "name": names[number], "failed": f"the process ended: {reason}"}
            number += 1
    for name in names[number:]:
        yield {"name": name, "skipped": "no time was left"}


def with_shares(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with each figure as a share of what the card can do, where both are known."""
    card = next((line for line in lines if line["name"] == "card" and "matrix_flops" in line), {})
    found = []
    for line in lines:
        shares = {}
        if "flops" in line and "matrix_flops" in card:
            shares["share_of_matrix_rate"] = line["flops"] / card["matrix_flops"]
        if "flops" in line and card.get("peak_flops"):
            shares["share_of_peak"] = line["flops"] / card["peak_flops"]
        if "weight_bytes" in line and "memory_bytes_per_second" in card:
            limit = card["memory_bytes_per_second"] / line["weight_bytes"]
            shares["share_of_memory_limit"] = line["tokens_per_second"] / limit
        if "estimated_memory_bytes" in line:
            shares["memory_estimate_ratio"] = line["estimated_memory_bytes"] / line["memory_bytes"]
            shares["time_estimate_ratio"] = line["estimated_step_seconds"] / line["step_seconds"]
        found.append({**line, **shares})
    return found


def table(lines: Sequence[Line]) -> str:
    """Return a table of all measurements, and the fastest of each preset.

    Example:
        >>> print(table([{"name": "card", "failed": "no"}]))
        card                                                           failed: no
    """
    rows = [f"{line['name']:62} {_described(line)}" for line in lines]
    best: dict[str, Line] = {}
    for line in lines:
        preset = line.get("preset")
        if preset and "flops" in line and "hidden_size" not in line:
            best[preset] = max(best.get(preset, line), line, key=lambda each: each["tokens_per_second"])
    rows += [f"fastest of {preset}: {line['name']}" for preset, line in best.items()]
    return "\n".join(rows)


def _described(line: Line) -> str:
    if "failed" in line or "skipped" in line:
        return f"failed: {line['failed']}" if "failed" in line else f"skipped: {line['skipped']}"
    if "matrix_flops" in line:
        sheet = f"{line['peak_flops'] / 1e12:.0f}" if line["peak_flops"] else "unknown"
        rates = f"{line['matrix_flops'] / 1e12:.2f} TFLOP/s measured, {sheet} by the data sheet"
        return f"{line['device']}, torch {line['torch']}: {rates}, {line['memory_bytes_per_second'] / 1e9:,.0f} GB/s"
    if "state_error" in line:
        ours, eager = (
            f"{line[f'{kind}state_error']:.1e}, {line[f'{kind}gradient_error']:.1e}" for kind in ("", "eager_")
        )
        return f"loss and gradient: {ours}; eager in the same format: {eager}"
    if "flops" in line:
        share = f", {line['share_of_matrix_rate']:.1%} of the matrix rate" if "share_of_matrix_rate" in line else ""
        peak = f", {line['share_of_peak']:.1%} of the peak" if "share_of_peak" in line else ""
        return (
            f"{line['tokens_per_second']:,.0f} tokens/s{share}{peak}, optimizer {line['optimizer_share']:.1%}, "
            f"{line['memory_bytes'] / 1e9:.1f} GB (estimate {line['memory_estimate_ratio']:.2f} of it, of the time "
            f"{line['time_estimate_ratio']:.2f}), waits: {line['waits_for_device']}"
        )
    if "weight_bytes" in line:
        limit = (
            f", {line['share_of_memory_limit']:.1%} of the memory's limit" if "share_of_memory_limit" in line else ""
        )
        return f"{line['tokens_per_second']:,.1f} tokens/s{limit}"
    return f"{1000 * line['seconds']:,.2f} ms"


if __name__ == "__main__":
    main()
