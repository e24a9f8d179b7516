"""The files that a run writes into its folder, by name, and how each is read and checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines
from fgpt_hf.parsing import Kind, as_type, parse_yaml
from fgpt_hf.tokenizer.surrogates import repair_surrogates

RECORD, METRICS, SAMPLES = "run.yaml", "metrics.jsonl", "samples.jsonl"
RESULTS, PROVENANCE = "results.json", "provenance.json"
Line = Mapping[str, float]  # of `metrics.jsonl`, by name
Lines = Sequence[Line]
Samples = Sequence[Mapping[str, Any]]  # the lines of `samples.jsonl`: `step`, and texts by name

MANY = 1e18  # more steps, tokens or seconds than any run has


def find_run(model: Path) -> Path | None:
    """Return the folder of the run that trained a model, given that folder or the model's own one inside it."""
    return next((folder for folder in (model, *model.resolve().parents[:2]) if (folder / RECORD).is_file()), None)


def read_record(path: Path) -> dict[str, Any]:
    """Return the values in a `run.yaml`; raise UserError if it is damaged."""
    return parse_record(path.read_bytes().decode(errors="replace"), str(path))


def parse_record(text: str, where: str) -> dict[str, Any]:
    """Return the values in the text of a `run.yaml`; raise UserError, which says where it is from, if it is damaged."""
    try:
        recorded = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    plain = (str, int, float, type(None))
    if not isinstance(recorded, dict) or not all(
        isinstance(name, str) and isinstance(value, plain) for name, value in recorded.items()
    ):
        raise UserError(f"{where} is damaged: it should hold the run's options, one per line")
    return recorded


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's `metrics.jsonl`: numbers by name, `step`, `tokens` and `seconds` among them.

    Raises:
        UserError: a line is anything else.
    """
    path = folder / METRICS
    lines = [
        _typed(path, number, dict[str, int | float], line) for number, line in enumerate(read_json_lines(path), start=1)
    ]
    for number, line in enumerate(lines, start=1):
        if not all(0 <= line.get(name, -1) < MANY for name in ("step", "tokens", "seconds")):
            raise UserError(f"{path} is damaged: line {number} lacks step, tokens or seconds")
    return [repair_surrogates(line) for line in lines]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `samples.jsonl`: `step`, and texts by name, `prompt` among them.

    Raises:
        UserError: a line is anything else.
    """
    path = folder / SAMPLES
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        texts = {name: value for name, value in line.items() if name != "step"}
        if not isinstance(line.get("step"), int) or "prompt" not in texts:
            raise UserError(f"{path} is damaged: line {number} lacks step or prompt")
        _typed(path, number, dict[str, str], texts)
    return [repair_surrogates(line) for line in lines]


def _typed(path: Path, number: int, kind: type[Kind], line: Mapping[str, Any]) -> Kind:
    try:
        return as_type(kind, line)
    except UserError as error:
        raise UserError(f"{path} is damaged: line {number}: {error}") from error
