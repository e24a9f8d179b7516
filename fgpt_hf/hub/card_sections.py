"""The sections of a model card, in their order; each is empty where the run knows nothing of it."""

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt_hf.hub.card_results import benchmark_measurements, noted_results, validation_measurements
from fgpt_hf.hub.run_record import RunRecord

# Fields of run.yaml that say where and how often something is written, and nothing about the model.
HOUSEKEEPING = re.compile(
    r"(overwrite_)?output_dir|resume_.*|.*_steps|save_.*|(push_to_)?hub.*|report_to|sample_prompt|validation_prompts"
)
TRAINING_STEPS = ("max_steps", "warmup_steps", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What no run knows and only a person can say; what is not told is left out of the card.

    Attributes:
        repo_id: where the model is published.
        stock: whether it is published as a GPT-2, which needs no remote code.
        dollars_per_hour: what one device costs.
        watts: what one device draws.
    """

    repo_id: str | None = None
    stock: bool = False
    license: str | None = None
    language: str | None = None
    base_model: str | None = None
    space: str | None = None
    dollars_per_hour: float | None = None
    watts: float | None = None

    def title(self, facts: RunRecord) -> str:
        """What the card calls the model."""
        return (self.repo_id or facts.run.get("preset") or facts.model.resolve().name).rpartition("/")[2]

    def place(self) -> str:
        """Where a reader loads the model from."""
        return self.repo_id or "path/to/this/folder"


def sections(facts: RunRecord, told: CardOptions) -> Iterator[str]:
    """All sections in Markdown."""
    yield _summary(facts, told)
    yield _quick_start(facts, told)
    yield _training_data(facts)
    yield _training(facts, told)
    yield _curves(facts)
    yield _results(facts)
    yield _samples(facts)
    yield _limits(facts)
    yield _software(facts)
    yield _licence_and_citation(facts, told)


def _summary(facts: RunRecord, told: CardOptions) -> str:
    kind = "LoRA adapter" if facts.is_adapter else "chat model" if facts.is_chat_model else "language model"
    network = "GPT-2's architecture" + (", as a stock `GPT2LMHeadModel`" if told.stock else "")
    lines = [f"# {told.title(facts)}", "", f"A {kind} of {facts.parameters:,} parameters with {network}."]
    base_model = told.base_model or facts.base_model
    if base_model:
        lines[-1] += f" It was trained from [{base_model}](https://huggingface.co/{base_model})."
    if told.space:
        lines += ["", f"Try it in its Space: [{told.space}](https://huggingface.co/spaces/{told.space})."]
    shape = {
        "parameters": f"{facts.parameters:,}",
        **{name: facts.config.get(ours) for name, ours in _SHAPE.items() if facts.config.get(ours) is not None},
    }
    return "\n".join([*lines, "", *_table(("shape", ""), shape.items())])


_SHAPE = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "attention heads": "num_attention_heads",
    "context, in tokens": "max_position_embeddings",
    "vocabulary": "vocab_size",
    "activation": "hidden_act",
    "weights": "dtype",
}


def _quick_start(facts: RunRecord, told: CardOptions) -> str:
    trust = "" if told.stock else ", trust_remote_code=True"
    prompt = '[{"role": "user", "content": "What is a tokenizer?"}]' if facts.is_chat_model else '"Once upon a time"'
    text = [
        "## Quick start",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", model="{told.place()}"{trust})',
        f'print(generate({prompt}, max_new_tokens=60)[0]["generated_text"])',
        "```",
        "",
        "or, piece by piece,",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{told.place()}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{told.place()}"{trust})',
        "```",
    ]
    if not told.stock:
        export = f"fgpt export {told.place()} gpt2 --format gpt2"
        text += ["", "The same network as a stock GPT-2, which needs no remote code, for vLLM, llama.cpp and the like:"]
        text += ["", "```sh", export, "```"]
    return "\n".join(text)


def _training_data(facts: RunRecord) -> str:
    if facts.dataset is None:
        return ""
    on_hub = facts.hub_datasets
    name = ", ".join(
        f"[{part}](https://huggingface.co/datasets/{part})" if part in on_hub else f"`{part}`"
        for part in facts.dataset.split(", ")
    )
    configuration = facts.dataset_configuration
    lines = ["## Training data", "", f"{name}{f', configuration `{configuration}`' if configuration else ''}."]
    splits = facts.provenance.get("data", {})
    if splits:
        rows = [(split, f"{size['documents']:,}", f"{size['tokens']:,}") for split, size in splits.items()]
        lines += ["", *_table(("split", "documents", "tokens"), rows)]
    if "validation_fraction" in facts.source:
        lines += [
            "",
            f"A hash of its text puts a document into the held-out {facts.source['validation_fraction']:.2%} or the "
            "rest: none is in both, whatever the order or the machine.",
        ]
    return "\n".join(lines)


def _training(facts: RunRecord, told: CardOptions) -> str:
    last, provenance = facts.last, facts.provenance
    devices = provenance.get("processes")
    hours = last["seconds"] / 3600 if "seconds" in last else None
    device_hours = hours * devices if hours is not None and devices else None
    effort = {
        "steps": last.get("step"),
        "tokens read": last.get("tokens"),
        "hardware": f"{devices} × {provenance['device']}" if devices and "device" in provenance else None,
        "precision": {"no": "float32"}.get(provenance.get("precision", ""), provenance.get("precision")),
        "hours": _short(hours) if hours is not None else None,
        "floating-point operations": f"{facts.training_flops:.2e}" if facts.training_flops else None,
        "estimated cost": _product(device_hours, told.dollars_per_hour, "${}"),
        "estimated energy": _product(device_hours, told.watts and told.watts / 1000, "{} kWh"),
    }
    known = [(name, f"{v:,}" if isinstance(v, int) else v) for name, v in effort.items() if v is not None]
    options = [
        (f"`{name}`", f"`{facts.without_folders(str(value))}`")
        for name, value in facts.run.items()
        if _is_about_training(name, value)
    ]
    if not known and not options:
        return ""
    lines = ["## Training", ""] + (_table(("", ""), known) + [""] if known else [])
    if options:
        lines += ["<details><summary>Hyper-parameters</summary>", "", *_table(("option", "value"), options), ""]
        lines += ["</details>"]
    return "\n".join(lines).strip()


def _product(hours: float | None, rate: float | None, form: str) -> str | None:
    return None if hours is None or rate is None else form.format(_short(hours * rate))


def _short(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"


def _is_about_training(name: str, value: Any) -> bool:
    return value is not None and (name in TRAINING_STEPS or not HOUSEKEEPING.fullmatch(name))


def _curves(facts: RunRecord) -> str:
    figures = figure_files(facts)
    lines = [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    return "\n".join(["## Curves", "", *lines]) if lines else ""


def figure_files(facts: RunRecord) -> dict[str, Path]:
    """The run's figures, under the names that they have in the published folder."""
    folder = facts.run_folder / "figures" if facts.run_folder else None
    return {f"figures/{path.name}": path for path in sorted(folder.glob("*.png"))} if folder else {}


def _results(facts: RunRecord) -> str:
    own = validation_measurements(facts)
    rows = [
        (m.task, m.metric, f"{m.value:.4f}" + (f" ± {m.error:.4f}" if m.error is not None else ""), m.convention or "")
        for m in (*own, *benchmark_measurements(facts), *noted_results(facts))
    ]
    if not rows:
        return ""
    lines = ["## Results", "", *_table(("task", "metric", "value ± standard error", "convention"), rows)]
    perplexity = [m for m in own if m.metric == "loss"]
    if perplexity:
        lines += ["", f"The held-out loss is a perplexity of {math.exp(perplexity[0].value):.1f} per token."]
    harness = facts.results.get("harness")
    versions = ", ".join(f"{name} {version}" for name, version in facts.results.get("versions", {}).items())
    if harness or versions:
        lines += ["", f"Measured with {harness or ''}{f' ({versions})' if harness and versions else versions}."]
    return "\n".join(lines)


def _samples(facts: RunRecord) -> str:
    lines = facts.last_samples
    if not lines:
        return ""
    if facts.is_chat_model:
        return "\n".join(_answers(facts))
    text = ["## Samples", "", f"All that the run wrote down after {lines[0]['step']:,} steps; none was left out."]
    for line in lines:
        for decoding, written in line.items():
            if decoding not in ("step", "prompt"):
                text += ["", f"{decoding}:", "", *_fenced(f"{line['prompt']}⟶{written}")]
    return "\n".join(text)


def _answers(facts: RunRecord) -> Iterator[str]:
    """Each prompt with its answers before and after."""
    before = {line["prompt"]: line for line in facts.first_samples}
    yield "## Answers"
    yield ""
    yield f"All that the run wrote down before it began and after {facts.last_samples[0]['step']:,} steps."
    yield ""
    decodings = [name for name in facts.last_samples[0] if name not in ("step", "prompt")]
    header = ("prompt", *(f"{when}, {decoding}" for decoding in decodings for when in ("before", "after")))
    rows = [
        (
            _inline(line["prompt"]),
            *(
                _inline(there.get(decoding, ""))
                for decoding in decodings
                for there in (before.get(line["prompt"], {}), line)
            ),
        )
        for line in facts.last_samples
    ]
    yield from _table(header, rows)


def _inline(text: str) -> str:
    """Text in a cell as it is, but for its line ends."""
    marked = re.sub(r"([\\`*_~\[\]$])", r"\\\1", html.escape(text.strip(), quote=False))
    return "<br>".join(marked.splitlines())


def _fenced(text: str) -> list[str]:
    """A block that shows text as it is, whatever it contains."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", text, fence]


def _limits(facts: RunRecord) -> str:
    context = facts.config.get("max_position_embeddings")
    lines = [
        "## Limits and intended use",
        "",
        "For experiments with language models and for learning how they are made. It continues text plausibly; it does "
        "not know what is true, and repeats the errors and the bias of its data. Nothing kept it from harmful or "
        "private text, and no filter stands behind it: do not let it decide about people, nor leave it "
        "alone with the public.",
    ]
    if context:
        lines[-1] += f" It sees {context:,} tokens at most, and refuses more."
    return "\n".join(lines)


def _software(facts: RunRecord) -> str:
    versions, commit = facts.provenance.get("versions", {}), facts.provenance.get("commit")
    rows = [*versions.items(), *([("commit", f"`{commit}`")] if commit else [])]
    return "\n".join(["## Software", "", *_table(("", "version"), rows)]) if rows else ""


def _licence_and_citation(facts: RunRecord, told: CardOptions) -> str:
    lines = ["## Licence", "", f"`{told.license}`"] if told.license else []
    if told.repo_id:
        owner, _, name = told.repo_id.partition("/")
        key = re.sub(r"\W+", "-", told.repo_id)
        entry = [f"@misc{{{key},", f"  title = {{{name}}},", f"  author = {{{owner}}},"]
        entry += [f"  howpublished = {{https://huggingface.co/{told.repo_id}}}", "}"]
        lines += ([""] if lines else []) + ["## Citation", "", "```bibtex", *entry, "```"]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Any) -> list[str]:
    """A Markdown table, in which no cell can end a column."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
