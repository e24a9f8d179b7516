"""The training tab: for each stage its curves, samples by step, results and card, from the record beside the model."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr
import pandas as pd

from card import Card
from model_source import fetch_record
from page_text import card_text

COLORS = ("#6366f1", "#f59e0b", "#10b981", "#ef4444", "#0ea5e9", "#a855f7", "#84cc16", "#ec4899")
MOST_POINTS = 600  # per curve: more would not be visible, and slow the page
FEW_POINTS = 4  # per curve: a table says as much as the curve
MOST_STAGES = 5


class Curves(NamedTuple):
    """A plot: keys of `metrics.jsonl` and their labels."""

    title: str
    unit: str
    keys: Mapping[str, str]


LOSS = Curves("Loss", "nats per token", {"loss": "training", "eval_loss": "validation"})
PREFERENCE = (
    LOSS._replace(title="Preference loss", unit="per pair of replies"),
    Curves(
        "Rewards",
        "mean reward of a reply",
        {
            "rewards/chosen": "chosen, training",
            "rewards/rejected": "rejected, training",
            "eval_rewards/chosen": "chosen, validation",
            "eval_rewards/rejected": "rejected, validation",
        },
    ),
    Curves(
        "Margin",
        "chosen minus rejected reward",
        {"rewards/margins": "training", "eval_rewards/margins": "validation"},
    ),
    Curves(
        "Pairs ranked as people did",
        "share of pairs",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "validation"},
    ),
)
PLOTS = (
    Curves("Learning rate", "", {"learning_rate": "learning rate"}),
    Curves("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    Curves("Speed", "tokens per second", {"tokens_per_second": "tokens per second"}),
)


class Stage(NamedTuple):
    """One training stage: what it was, the model that came of it, and its record."""

    title: str
    name: str
    card: Card


def lineage(card: Card, served_base: Card | None = None) -> list[Stage]:
    """Return the stages that led to a model, the first one first, as far as their cards and records can be read.

    Args:
        card: The card of the model, whose metadata may name the one before it.
        served_base: The card of the base model that this page also serves, for a model whose card names none.
    """
    cards, names = [card], [card.title]
    while len(cards) < MOST_STAGES and (name := cards[-1].base_model):
        folder = fetch_record(name)
        if folder is None or any(folder == known.folder for known in cards):
            break
        cards.append(Card(folder))
        names.append(name)
    if len(cards) == 1 and served_base:
        cards.append(served_base)
        names.append(served_base.title)
    stages = [Stage(_kind(known, cards[at + 1 :]), names[at], known) for at, known in enumerate(cards)]
    return stages[::-1]


def _kind(card: Card, before: Sequence[Card]) -> str:
    """Return the kind of a stage from what it measured, what its model is for and what came before it."""
    if any(key.startswith("rewards/") for line in card.metrics for key in line):
        return "Preference tuning"
    return "Instruction tuning" if before or (card.data and card.is_conversational) else "Base training"


def training_tab(stages: Sequence[Stage]) -> None:
    """Lay out the record of each stage under a heading of its own; the last one is unfolded."""
    for number, stage in enumerate(stages, start=1):
        label = f"{number}. {stage.title}" if len(stages) > 1 else stage.title
        named = f"{label}: {stage.name}" if stage.name else label
        with gr.Accordion(named, open=number == len(stages)):
            _record(stage.card)


def _record(card: Card) -> None:
    if card.metrics:
        for row in _rows(plots_of(card.metrics)):
            with gr.Row():
                for plot in row:
                    _plot(card.metrics, plot)
    else:
        gr.Markdown("This model was published without the record of its training (`metrics.jsonl`).")
    if card.samples:
        _samples(card.samples)
    if card.section("Results"):
        gr.Markdown(f"## Results\n{card_text(card.section('Results'))}", elem_classes="card-text")
    if card.text:
        with gr.Accordion("The model card", open=False):
            gr.Markdown(card_text(card.text), elem_classes="card-text")


def _rows(plots: Sequence[Curves]) -> list[Sequence[Curves]]:
    return [plots[first : first + 2] for first in range(0, len(plots), 2)]


def plots_of(metrics: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Return the plots that have points: of the loss that was trained, of the run, and of each benchmark."""
    keys = {key for line in metrics for key in line if line[key] is not None and not key.endswith("_stderr")}
    objective = PREFERENCE if any("rewards/" in key for key in keys) else (LOSS,)
    measured = sorted(key for key in keys if "/" in key and "rewards/" not in key)
    tasks = [Curves(task, _unit(measures), measures) for task, measures in _tasks(measured)]
    return [plot for plot in (*objective, *PLOTS, *tasks) if keys & plot.keys.keys()]


def _tasks(keys: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Group the keys `task/measure` by task, and within it by what shares an axis: shares, or one measure."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        task, _, measure = key.partition("/")
        groups.setdefault((task, "share" if _is_share(measure) else measure), {})[key] = measure
    return [(task, measures) for (task, _), measures in groups.items()]


def _is_share(measure: str) -> bool:
    return measure.startswith("acc") or measure in ("exact_match", "f1")


def _unit(measures: Mapping[str, str]) -> str:
    first = next(iter(measures.values()))
    return "share of answers" if _is_share(first) else first.replace("_", " ")


def table(metrics: Sequence[Mapping[str, Any]], plot: Curves) -> pd.DataFrame:
    """Return a plot's points as `step`, `value` and `curve`, evenly thinned out if there are many."""
    frames = []
    for key, name in plot.keys.items():
        points = [(line["step"], float(line[key]), name) for line in metrics if line.get(key) is not None]
        stride = -(-len(points) // MOST_POINTS) or 1
        frames.append(pd.DataFrame(points[::stride], columns=["step", "value", "curve"]))
    return pd.concat(frames)


def few_points(points: pd.DataFrame) -> str:
    """Return the points as a Markdown table with a row for each step and a column for each curve."""
    curves = list(dict.fromkeys(points["curve"]))
    rows = points.pivot_table(index="step", columns="curve", values="value", aggfunc="last")[curves]
    lines = ["| step | " + " | ".join(curves) + " |", "|---:|" + "---:|" * len(curves)]
    for step, *values in rows.itertuples():
        lines.append(f"| {step:,} | " + " | ".join("–" if math.isnan(v) else f"{v:,.4g}" for v in values) + " |")
    return "\n".join(lines)


def _plot(metrics: Sequence[Mapping[str, Any]], plot: Curves) -> None:
    points = table(metrics, plot)
    if points.groupby("curve").size().max() <= FEW_POINTS:
        unit = f", {plot.unit}" if plot.unit else ""
        gr.Markdown(f"**{plot.title}**{unit}\n\n{few_points(points)}", elem_classes="card-text")
        return
    names = list(plot.keys.values())
    gr.LinePlot(
        points,
        x="step",
        y="value",
        color="curve" if len(names) > 1 else None,
        color_map=dict(zip(names, COLORS, strict=False)) if len(names) > 1 else None,
        title=plot.title,
        x_title="step",
        y_title=plot.unit or plot.title.lower(),
        color_title=" ",
        height=280,
        buttons=["fullscreen"],
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Add a slider over the steps, and what the model wrote at each."""
    steps = sorted({line["step"] for line in samples})
    interval = math.gcd(*(step - steps[0] for step in steps)) or 1
    after = gr.Slider(
        steps[0], max(steps[-1], steps[0] + 1), value=steps[-1], step=interval, label="Samples after this many steps"
    )
    written = gr.HTML(sample_cards(samples, steps[-1]), elem_classes="samples")
    after.change(
        lambda step: sample_cards(samples, max(known for known in steps if known <= max(step, steps[0]))),
        after,
        written,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )


def sample_cards(samples: Sequence[Mapping[str, Any]], step: int) -> str:
    """Return HTML with a card for each prompt of a step: the prompt, and what followed it in each way of decoding."""
    return "".join(_sample_card(line) for line in samples if line["step"] == step)


def _sample_card(line: Mapping[str, Any]) -> str:
    written = [(name, text) for name, text in line.items() if name not in ("step", "prompt")]
    parts = [f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(text))}</dd>" for name, text in written]
    prompt = html.escape(str(line.get("prompt", "")))
    return f'<article><p class="prompt">{prompt}</p><dl>{"".join(parts)}</dl></article>'
