"""Summarize a run: losses and samples before and after, what it has reached, and what comes next."""

import statistics
import textwrap
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from fgpt_hf.report.measured import MEASUREMENTS, benchmark_keys, measured_lines, series
from fgpt_hf.report.next_steps import describe_next_steps
from fgpt_hf.training.records import RECORD, Lines, Samples, read_record, read_samples
from fgpt_hf.wording import count_of

ANSWER_COLUMNS = {"prompt": 30, "before": 40, "after": 40}  # with their widths
COLUMN_GAP = "  "
MAX_LINES = 4  # of a prompt or an answer in the table


def summarize_run(folder: Path) -> str:
    """Return what a run has achieved so far: losses and samples before and after, files, and what to do next.

    Raises:
        UserError: the folder is not a run's, or nothing has been measured in it yet.

    Example:
        >>> print(summarize_run(Path("runs/quickstart/base")))  # doctest: +SKIP
        runs/quickstart/base: 400 steps, 819,200 tokens, 95 s of training
          training loss    10.826 at step 1 -> 4.105 at step 400
        ...
    """
    metrics = measured_lines(folder)
    samples = read_samples(folder)
    has_answers = any("answers_ended" in line for line in metrics)
    parts = [
        _changes(folder, metrics),
        _answer_table(samples) if has_answers else _sample_lines(samples),
        _contents(folder),
        describe_next_steps(folder, read_record(folder / RECORD), metrics),
    ]
    return "\n\n".join(text for text in map("\n".join, parts) if text)


def _changes(folder: Path, metrics: Lines) -> Iterator[str]:
    """Yield the first and the last value of each loss and benchmark, and the speed."""
    last = metrics[-1]
    taken = count_of(int(last["step"]), "step")
    yield f"{folder}: {taken}, {last['tokens']:,} tokens, {last['seconds']:,.0f} s of training"
    candidates = MEASUREMENTS | {key: key for key in benchmark_keys(metrics)}
    names = {key: name for key, name in candidates.items() if series(metrics, key).steps}
    width = max(map(len, (*names.values(), "speed")))
    for key, name in names.items():
        steps, values = series(metrics, key)
        errors = series(metrics, f"{key}_stderr").values
        error = f" ± {errors[-1]:.3f}" if errors else ""
        yield (f"  {name:<{width}}  {values[0]:.3f} at step {steps[0]} -> {values[-1]:.3f}{error} at step {steps[-1]}")
    if speeds := series(metrics, "tokens_per_second").values:
        yield f"  {'speed':<{width}}  {statistics.median(speeds):,.0f} tokens/s (median)"
    if skipped := int(last.get("skipped_steps", 0)):
        yield f"  {count_of(skipped, 'step')} skipped: a non-finite gradient, or a batch without labels"


def _sample_lines(samples: Samples) -> Iterator[str]:
    """Yield what the model wrote at the first and at the last step that has samples."""
    for step in sorted({samples[0]["step"], samples[-1]["step"]} if samples else ()):
        yield f"samples after {count_of(step, 'step')}:"
        for line in samples:
            if line["step"] == step:
                yield f"  {line['prompt']!r} ... {line['sampled'][:160]!r}"


def _answer_table(samples: Samples) -> Iterator[str]:
    """Yield a table of the greedy answers at the first and at the last step that has any, prompt by prompt."""
    if not samples:
        return
    steps = samples[0]["step"], samples[-1]["step"]
    before, after = ({line["prompt"]: line["greedy"] for line in samples if line["step"] == step} for step in steps)
    yield f"greedy answers before training, and after {count_of(steps[1], 'step')} (sampled ones are in samples.jsonl):"
    yield from _table_row(ANSWER_COLUMNS)
    for prompt, answer in after.items():
        yield COLUMN_GAP.join("-" * width for width in ANSWER_COLUMNS.values())
        yield from _table_row((prompt, before.get(prompt, ""), answer))


def _table_row(cells: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a row, each cell wrapped to its width, `MAX_LINES` at most."""
    columns = [
        textwrap.wrap(" ".join(cell.split()), width, max_lines=MAX_LINES, placeholder=" …") or [""]
        for cell, width in zip(cells, ANSWER_COLUMNS.values(), strict=True)
    ]
    for parts in zip_longest(*columns, fillvalue=""):
        padded = (f"{part:<{width}}" for part, width in zip(parts, ANSWER_COLUMNS.values(), strict=True))
        yield COLUMN_GAP.join(padded).rstrip()


def _contents(folder: Path) -> Iterator[str]:
    """Yield the figure to look at first, and what else the folder holds."""
    loss = folder / "figures" / "loss.png"
    if loss.is_file():
        yield f"its curves:  {loss}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    names = ", ".join(path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()))
    yield f"its folder:  {folder}, {size / 1e6:,.1f} MB: {names}"
