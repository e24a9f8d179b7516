"""Advice while a run trains: rules that look at what was measured so far, each of which speaks once.

A rule is a function of the lines of `metrics.jsonl` and of `RunFacts`; it returns a sentence that says what is seen and
what to change, or None. Thresholds are wide: advice that is wrong once is not read again.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun, Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.runtime.network import count_parameters, network_config
from fgpt_hf.training.records import Line, Lines, find_run, read_metrics

# A run that sees a text more often than this learns little more from it (Muennighoff et al. 2023, arXiv:2305.16264).
USEFUL_EPOCHS = 4
# Fewer tokens of text than this for each parameter are learned by heart in a few epochs; the quickstart has 0.77.
FEW_TOKENS = 0.1
RISE = 1.01  # of the validation loss, which is measured on fixed rows and has no noise
FLAT_STEPS, FLAT_SHARE, FLAT_LINES = 50, 0.05, 12  # steps, and share of the run, before a loss is said not to fall
DIVERGING_LINES = 5  # at least, on both sides of a comparison
NOISE_FACTOR = 10  # standard errors by which a training loss must rise to diverge: the least of many is low by chance
OFTEN = 20  # rules look at every line so long, and then whenever there are a twentieth more of them
# The bits per byte of a language that a model has never seen; a uniform guess of English tokens has 3.6 to 5.6.
STRANGE_BITS, STRANGER_BITS = 4.0, 5.0  # if the base model's own text is known to take less than half; if it is not


class RunFacts(NamedTuple):
    """What is known of a run before its first step.

    Attributes:
        max_steps: steps of the whole run.
        parameters: parameters of the network.
        text_tokens: tokens of the training text, if they are known.
        epochs: how often the data will be seen, if that is known.
        base_bits: bits per byte of the base model's own text at the end of its training, if they are known.
    """

    run: Run
    max_steps: int
    parameters: int
    text_tokens: int | None = None
    epochs: float | None = None
    base_bits: float | None = None


class Adviser:
    """Applies the rules to a run, line by line.

    Example:
        >>> adviser = Adviser(RunFacts(BaseRun(preset="mine"), 100, parameters=10**6, text_tokens=5_000, epochs=9.0))
        >>> adviser.observe({"step": 0})  # doctest: +ELLIPSIS
        ['5,000 tokens of text are few for 1,000,000 parameters, ...']
        >>> adviser.observe({"step": 1})
        []
    """

    def __init__(self, facts: RunFacts, earlier: Lines = ()) -> None:
        self.facts = facts
        self._lines: list[Line] = []
        self._rules = list(RULES)
        self._next_look = 1
        for line in earlier:  # of a resumed run, whose advice was given then
            self.observe(line)

    def observe(self, line: Line) -> list[str]:
        """Add a line of `metrics.jsonl`; return what is to be said now."""
        self._lines.append(line)
        if len(self._lines) < self._next_look and line["step"] != self.facts.max_steps:
            return []
        self._next_look = len(self._lines) + 1 + len(self._lines) // OFTEN
        said = {rule: rule(self._lines, self.facts) for rule in self._rules}
        self._rules = [rule for rule, advice in said.items() if advice is None]
        return [advice for advice in said.values() if advice is not None]


def bits_of_base(run: Run) -> float | None:
    """Return the bits per byte that the run which an instruct run starts from reached on its own text, or None."""
    folder = find_run(Path(run.model_name_or_path)) if isinstance(run, TuningRun) else None
    if folder is None:
        return None
    try:
        measured = [line["eval_bits_per_byte"] for line in read_metrics(folder) if "eval_bits_per_byte" in line]
    except UserError:  # said where the record is needed
        return None
    return measured[-1] if measured else None


def too_little_text(lines: Lines, facts: RunFacts) -> str | None:
    """Say that a network is too large for its text, which it will see many times, and which network fits."""
    tokens, epochs = facts.text_tokens, facts.epochs
    if not isinstance(facts.run, BaseRun) or tokens is None or epochs is None:
        return None
    if facts.run.start_model is not None:  # a network that is given is as large as it is
        return None
    if epochs <= USEFUL_EPOCHS or tokens >= FEW_TOKENS * facts.parameters:
        return None
    smaller = _fitting(facts.run, tokens, facts.parameters)
    return (
        f"{tokens:,} tokens of text are few for {facts.parameters:,} parameters, which will see them {epochs:,.0f} "
        f"times and learn them by heart: add text, or train a smaller network ({smaller})"
    )


def _fitting(run: BaseRun, tokens: int, parameters: int) -> str:
    """Return the largest preset of the same blocks that has enough text, or the smallest one, or a smaller network."""
    alike = [preset for name, preset in PRESETS.items() if name.endswith("-modern") == run.preset.endswith("-modern")]
    sizes = {preset.preset: count_parameters(network_config(preset)).total for preset in alike}
    smaller = sorted((size, name) for name, size in sizes.items() if size < parameters)
    if not smaller:
        return "--hidden_size 128 --num_hidden_layers 4"
    fitting = [name for size, name in smaller if tokens >= FEW_TOKENS * size]
    return f"--preset {fitting[-1] if fitting else smaller[0][1]}"


def overfits(lines: Lines, facts: RunFacts) -> str | None:
    """Say that the validation loss has risen twice above its minimum while the training loss went on falling."""
    validation = [line for line in lines if "eval_loss" in line]
    if len(validation) < 3:
        return None
    best = min(validation, key=lambda line: line["eval_loss"])
    last_two = validation[-2:]
    if any(line["step"] <= best["step"] or line["eval_loss"] < RISE * best["eval_loss"] for line in last_two):
        return None
    since = _losses(line for line in lines if line["step"] > best["step"])
    before = _losses(line for line in lines if line["step"] <= best["step"])[-len(since) :]
    if not since or not before or statistics.fmean(since) >= statistics.fmean(before):
        return None
    remedy = "--dropout 0.1" if isinstance(facts.run, BaseRun) else "a lower --learning_rate"
    at, lowest, last = int(best["step"]), best["eval_loss"], last_two[-1]["eval_loss"]
    return (
        f"the validation loss rises ({lowest:.3f} at step {at} -> {last:.3f}) while the training loss falls: the model "
        f"learns its data by heart. Stop earlier (--max_steps {max(at, 1)}), add data, or try {remedy}"
    )


def does_not_fall(lines: Lines, facts: RunFacts) -> str | None:
    """Say that the training loss has not fallen since the warm-up; preference losses move too little to tell."""
    after = [line for line in lines if "loss" in line and line["step"] > facts.run.warmup_steps]
    if isinstance(facts.run, PreferenceRun) or len(after) < FLAT_LINES:
        return None
    if after[-1]["step"] - after[0]["step"] < max(FLAT_STEPS, FLAT_SHARE * facts.max_steps):
        return None
    losses = [line["loss"] for line in after]
    quarter = len(losses) // 4
    first, last = statistics.fmean(losses[:quarter]), statistics.fmean(losses[-quarter:])
    if not last >= first:  # also where one is NaN
        return None
    return (
        f"the training loss has not fallen from step {after[0]['step']} to step {after[-1]['step']} ({first:.3f} -> "
        f"{last:.3f}): try a learning rate ten times as high, or as low, as --learning_rate {facts.run.learning_rate:g}"
    )


def diverges(lines: Lines, facts: RunFacts) -> str | None:
    """Say that the training loss has risen far above what it had reached, by more than its noise explains.

    Medians are compared, which single bad batches leave alone. Preference losses are too noisy for that.
    """
    losses = [line for line in lines if math.isfinite(line.get("loss", math.nan))]
    window = max(DIVERGING_LINES, len(losses) // 20)
    if isinstance(facts.run, PreferenceRun) or len(losses) < 2 * window:
        return None
    values = [line["loss"] for line in losses]
    ends = range(len(values) - window, window - 1, -window)
    best, at = min((statistics.median(values[end - window : end]), losses[end - 1]["step"]) for end in ends)
    last = statistics.median(values[-window:])
    if last < best + max(0.1 * abs(best), NOISE_FACTOR * _noise(values) / math.sqrt(window)):
        return None
    return (
        f"the training loss rises ({best:.3f} at step {at} -> {last:.3f} at step {losses[-1]['step']}): "
        f"--learning_rate {facts.run.learning_rate:g} is too high; try {facts.run.learning_rate / 3:.1g}"
    )


def strange_language(lines: Lines, facts: RunFacts) -> str | None:
    """Say that a base model has never seen the language, or the kind of text, of the conversations."""
    bits = lines[0].get("eval_bits_per_byte")
    if not isinstance(facts.run, InstructRun) or bits is None or lines[0]["step"] != 0:
        return None
    known = facts.base_bits
    if bits < (STRANGER_BITS if known is None else max(STRANGE_BITS, 2 * known)):
        return None
    own = "" if known is None else f", and {known:.1f} of its own text"
    return (
        f"the model needs {bits:.1f} bits for each byte of these replies{own}: it has hardly seen their language or "
        "their kind of text. Train a base model on such text first"
    )


def never_ends(lines: Lines, facts: RunFacts) -> str | None:
    """Say that no greedy answer has ended, at the last step, or twice after the first one."""
    ended = [line["answers_ended"] for line in lines if "answers_ended" in line and line["step"] > 0]
    is_late = len(ended) >= 2 or lines[-1]["step"] == facts.max_steps
    if not isinstance(facts.run, TuningRun) or not ended or any(ended) or not is_late:
        return None
    return (
        f"none of the sampled answers ends within --max_new_tokens {facts.run.max_new_tokens}: train for more steps, "
        "or raise it if the replies of the data are longer"
    )


RULES: Sequence[Callable[[Lines, RunFacts], str | None]] = (
    too_little_text,
    strange_language,
    overfits,
    does_not_fall,
    diverges,
    never_ends,
)


def _losses(lines: Iterable[Line]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation of a loss from step to step, by the median of its changes, for a normal law."""
    return statistics.median(abs(after - before) for before, after in zip(values, values[1:], strict=False)) / 0.954
