"""Show a run in the terminal while it trains."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt_hf.errors import UserError
from fgpt_hf.report.measured import MEASUREMENTS, measured_lines, series
from fgpt_hf.runtime.duration import duration, time_of_day
from fgpt_hf.training.records import METRICS, RECORD, Lines, read_metrics, read_record, read_samples

BARS = "▁▂▃▄▅▆▇█"
CLEAR = "\x1b[H\x1b[J"
SECONDS = 2.0  # between two looks


def watch_run(folder: Path, seconds: float = SECONDS) -> None:
    """Print a run's state again and again until it is finished; Ctrl-C ends the watch, not the run.

    Where the output is no terminal, a new state follows the one before, instead of taking its place.

    Raises:
        UserError: the folder is not a run's.
    """
    before = ""
    try:
        while True:
            frame = render_frame(folder, shutil.get_terminal_size().columns)
            if frame != before:
                print(f"{CLEAR if sys.stdout.isatty() else ''}{frame}", flush=True)
            before = frame
            if is_finished(folder):
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()


def is_finished(folder: Path) -> bool:
    """Return whether a run took its last step and saved its model."""
    lines, last = read_metrics(folder), read_record(folder / RECORD).get("max_steps")
    return bool(lines) and (folder / "model").is_dir() and isinstance(last, int) and lines[-1]["step"] >= last


def render_frame(folder: Path, columns: int = 80) -> str:
    """Return a run's state now, in lines of at most that many columns."""
    if not (folder / RECORD).is_file():
        measured_lines(folder)  # which says what is wrong
    if not read_metrics(folder):
        return f"{folder}: no step is finished yet"
    metrics, recorded = measured_lines(folder), read_record(folder / RECORD)
    lines = [*_progress(folder, recorded, metrics, columns), "", *_measurements(metrics, columns), *_sample(folder)]
    return "\n".join(line[:columns] for line in lines)


def _progress(folder: Path, recorded: Mapping[str, Any], metrics: Lines, columns: int) -> Iterator[str]:
    """Yield the step, when the run ends, and a bar."""
    line, steps = metrics[-1], recorded.get("max_steps")
    ago = time.time() - (folder / METRICS).stat().st_mtime
    yield f"{folder}: step {line['step']:,}, {line['tokens']:,} tokens, {duration(line['seconds'])} of training"
    if not isinstance(steps, int) or not steps:
        return
    share = min(1.0, line["step"] / steps)
    width = max(10, min(columns - 20, 60))
    yield f"{'█' * round(share * width):░<{width}} {share:4.0%} of {steps:,}"
    if is_finished(folder):
        yield "finished"
    elif line["step"]:
        left = line["seconds"] / line["step"] * (steps - line["step"])
        yield f"ends at about {time_of_day(left)}; last line {duration(ago)} ago"


def _measurements(metrics: Lines, columns: int) -> Iterator[str]:
    """Yield the first and the last value of each measurement, with its curve."""
    names = {key: name for key, name in MEASUREMENTS.items() if series(metrics, key).steps}
    width = max(map(len, names.values()), default=0)
    room = max(8, columns - width - 26)
    for key, name in names.items():
        values = series(metrics, key).values
        yield f"{name:<{width}}  {values[0]:9.3f} -> {values[-1]:<9.3f} {sparkline(values, min(room, 40))}"


def _sample(folder: Path) -> Iterator[str]:
    """Yield the last thing that the model wrote."""
    samples = read_samples(folder)
    if samples:
        last = samples[-1]
        yield ""
        yield f"at step {last['step']:,}: {last['prompt']!r} ... {last.get('sampled', '')!r}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve in one line of characters, of means over equal parts.

    Example:
        >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], width=8)
        '▁▂▃▄▅▆▇█'
    """
    finite = [value for value in values if abs(value) < float("inf")]  # NaN is not less than anything
    if not finite:
        return ""
    count = min(width, len(finite))
    bounds = [round(index * len(finite) / count) for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for mean in means)


def only_run(folders: Sequence[Path]) -> Path:
    """Return the only folder; UserError if there are several."""
    if len(folders) != 1:
        raise UserError(f"--watch shows one run, not {len(folders)}: name the one that is training")
    return folders[0]
