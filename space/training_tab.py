"""The training tab: curves, samples by step, results and the card, from the record published with the model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr
import pandas as pd

from card import Card
from language_model import LanguageModel
from model_summary import shown

COLORS = ("#6366f1", "#f59e0b", "#10b981", "#ef4444", "#0ea5e9", "#a855f7", "#84cc16", "#ec4899")
MOST_POINTS = 600  # per curve: more would not be visible, and slow the page
FEW_POINTS = 4  # per curve: a table says as much as the curve


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


def training_tab(models: Sequence[LanguageModel]) -> None:
    """Lay out the training record of each model, the last stage first."""
    if len(models) == 1:
        _record(models[0].card)
        return
    for name, model in zip(("This model", "The base model"), models, strict=True):
        with gr.Tab(name):
            _record(model.card)


def _record(card: Card) -> None:
    if card.metrics:
        plots = plots_of(card.metrics)
        for first in range(0, len(plots), 2):
            with gr.Row():
                for plot in plots[first : first + 2]:
                    _plot(card.metrics, plot)
    else:
        gr.Markdown("This model was published without the record of its training (`metrics.jsonl`).")
    if card.samples:
        _samples(card.samples)
    if card.section("Results"):
        gr.Markdown(shown(f"### Results\n{card.section('Results')}"), elem_classes="prose")
    if card.text:
        with gr.Accordion("The model card", open=False):
            gr.Markdown(shown(card.text), elem_classes="prose")


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
        gr.Markdown(f"**{plot.title}**{unit}\n\n{few_points(points)}", elem_classes="prose")
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
    written = gr.Textbox(
        _at(samples, steps[-1]), lines=10, max_lines=24, interactive=False, show_label=False, elem_id="samples"
    )
    after.change(
        lambda step: _at(samples, max(known for known in steps if known <= max(step, steps[0]))),
        after,
        written,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )


def _at(samples: Sequence[Mapping[str, Any]], step: int) -> str:
    """Return all samples of a step as text."""
    parts = []
    for line in samples:
        if line["step"] == step:
            written = [f"[{name}] {text}" for name, text in line.items() if name not in ("step", "prompt")]
            parts.append("\n".join([f"» {line['prompt']}", *written]))
    return "\n\n".join(parts)
