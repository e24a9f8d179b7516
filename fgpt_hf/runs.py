"""The typed description of a run: its fields are the command line, its instances the presets, its YAML the record."""

import difflib
import os
import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArg, HfArgumentParser, string_to_bool

Schedule = Literal["cosine", "linear", "warmup_stable_decay", "constant"]
Optimizer = Literal["muon", "adamw"]
Tracker = Literal["none", "trackio", "tensorboard", "wandb"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]


def option(default: Any, help: str) -> Any:
    """A field of a run: its default and the sentence that `--help` says of it."""
    return HfArg(default=default, help=help)


def require_amounts(values: Mapping[str, Any], may_be_zero: Sequence[str] = ()) -> None:
    """Raise ValueError for the first number that is not above zero, or not zero where that has a meaning."""
    for name, value in values.items():
        least = "zero or more" if name in may_be_zero else "above zero"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and (value < 0 or (value == 0 and name not in may_be_zero)):
            raise ValueError(f"{name}={value} must be {least}")


@dataclass(kw_only=True)
class Run:
    """What every kind of training says about itself. The names are those of transformers' `TrainingArguments`."""

    preset: str = option("fgpt-712m", "the named run whose values every other flag starts from")
    output_dir: str | None = option(None, "where the run is written (default: runs/PRESET)")
    overwrite_output_dir: bool = option(False, "delete the run that output_dir already holds")
    resume_from_checkpoint: str | None = option(
        None, "'latest', or a folder under checkpoints/: continue exactly there"
    )
    seed: int = option(1337, "of weights, order of the rows and dropout")

    max_steps: int = option(27_000, "optimizer steps of the whole run")
    per_device_train_batch_size: int = option(16, "rows of a micro-batch on each device, or auto")
    auto_find_batch_size: bool = option(
        False, "what --per_device_train_batch_size auto says: as many rows as fit, the rows of a step as they were"
    )
    gradient_accumulation_steps: int = option(32, "micro-batches a step on each device")
    learning_rate: float = option(2.5e-4, "peak learning rate")
    warmup_steps: int = option(700, "steps of linear warm-up")
    lr_scheduler_type: Schedule = option("cosine", "what follows the warm-up")
    min_lr_ratio: float = option(0.1, "share of the peak at which cosine and decay end")
    optim: Optimizer = option("muon", "muon: for the matrices inside the layers, AdamW for the rest")
    weight_decay: float = option(0.1, "decoupled decay, on matrices only")
    adam_beta1: float = option(0.9, "AdamW's first momentum")
    adam_beta2: float = option(0.95, "AdamW's second momentum")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    max_bad_steps: int = option(10, "stop after so many steps in a row without a finite gradient")

    bf16: bool | None = option(None, "bfloat16 products (default: where the hardware has them)")
    fp16: bool = option(False, "float16 products with loss scaling, for GPUs without bfloat16")
    torch_compile: bool = option(False, "compile the network")
    fsdp: bool = option(False, "share weights, gradients and optimizer state among the processes (FSDP2)")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more work")
    attn_implementation: Attention = option("auto", "auto: flash attention where installed, else sdpa")

    logging_steps: int = option(10, "period of the lines in metrics.jsonl")
    eval_steps: int = option(500, "period of the held-out loss")
    eval_tasks: str | None = option(None, "benchmarks by name, separated by commas: fgpt evaluate --help")
    eval_task_steps: int = option(2000, "period of the benchmarks")
    eval_task_limit: int | None = option(None, "only the first so many examples of each benchmark")
    sample_steps: int = option(1000, "period of the sample outputs")
    save_steps: int = option(1000, "period of the checkpoints")
    save_total_limit: int = option(3, "checkpoints that are kept")
    report_to: Tracker = option("none", "a tracker that gets every line of metrics.jsonl too")

    push_to_hub: bool = option(False, "publish the checkpoints as the run goes on, and the finished model")
    hub_model_id: str | None = option(None, "where on the Hub: user/name")
    hub_private_repo: bool = option(False, "make a new repo private")

    def __post_init__(self) -> None:
        require_amounts(asdict(self), self.may_be_zero)
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other: give one of them")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub=true needs hub_model_id=user/name")
        if self.output_dir is None:
            self.output_dir = f"runs/{self.preset}"

    may_be_zero: ClassVar[Sequence[str]] = ("seed", "warmup_steps", "min_lr_ratio", "weight_decay")
    # What a resumed run must have as it was, because weights, data or optimizer state depend on it.
    lasting: ClassVar[Sequence[str]] = ("preset", "seed", "optim")

    @property
    def task_names(self) -> list[str]:
        """The benchmarks that the run is measured by."""
        return [name for name in (self.eval_tasks or "").split(",") if name]

    @property
    def folder(self) -> Path:
        return Path(str(self.output_dir))

    def divide_step(self, rows_on_device: int, rows: int) -> None:
        """Let each device train on its rows of a step in micro-batches of `rows`."""
        self.per_device_train_batch_size, self.gradient_accumulation_steps = rows, rows_on_device // rows
        self.auto_find_batch_size = False

    def to_yaml(self) -> str:
        """The run as a file that `--config` reads back."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


@dataclass(kw_only=True)
class TextSource:
    """Which documents, which of them are held out, and how they become rows of tokens."""

    dataset_name: str = option(
        "fineweb-edu", "a known corpus, a Hub data set, a prepared folder, or a text, JSON lines or parquet file"
    )
    dataset_config_name: str | None = option(None, "configuration of a Hub data set, such as sample-100BT")
    dataset_revision: str | None = option(None, "commit of a Hub data set (default: the newest)")
    text_column_name: str = option("text", "the column that holds the documents")
    held_out_share: float = option(0.01, "share of the documents that is never trained on")
    max_position_embeddings: int = option(1024, "context, and length of a training row, in tokens")
    preprocessing_num_workers: int | None = option(
        None, "workers that tokenise (default: one a core to prepare, two to stream)"
    )


@dataclass(kw_only=True)
class Preparation(TextSource):
    """What `fgpt prepare` does."""

    output_dir: str = option("runs/prepared", "the folder of the prepared rows; an unfinished one is continued")
    max_train_tokens: int | None = option(None, "stop after about so many tokens (default: all of the documents)")
    hub_dataset_id: str | None = option(None, "also push the rows to this data set on the Hub")

    def __post_init__(self) -> None:
        require_amounts(asdict(self))


@dataclass(kw_only=True)
class BaseRun(TextSource, Run):
    """Base training: the network's shape and the text. The defaults are the published run.

    0.5M tokens a step and the learning rate are GPT-3's for this size (Brown et al. 2020, table 2.1); 14.2B tokens are
    20 for each parameter (Hoffmann et al. 2022).
    """

    may_be_zero: ClassVar[Sequence[str]] = (*Run.may_be_zero, "dropout")
    lasting: ClassVar[Sequence[str]] = (
        *Run.lasting,
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "dataset_name",
        "dataset_config_name",
        "dataset_revision",
        "streaming",
        "text_column_name",
        "held_out_share",
    )

    hidden_size: int = option(1296, "width of the network")
    num_hidden_layers: int = option(32, "layers")
    num_attention_heads: int = option(24, "attention heads; they divide the width")
    dropout: float = option(0.0, "of embeddings, attention and residuals")

    streaming: bool = option(True, "read documents as training goes, instead of preparing all of them first")
    max_eval_rows: int = option(512, "rows of the fixed held-out set")
    sample_prompt: str = option("Once upon a time", "continued as training goes, with one of the corpus")


PRESETS: Mapping[str, BaseRun] = {
    run.preset: run
    for run in (
        BaseRun(preset="fgpt-712m"),
        # GPT-3's rates for these sizes; 20 tokens a parameter.
        BaseRun(
            preset="fgpt-355m",
            num_hidden_layers=24,
            num_attention_heads=16,
            hidden_size=1024,
            learning_rate=3e-4,
            max_steps=13_600,
        ),
        BaseRun(
            preset="fgpt-124m",
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_size=768,
            learning_rate=6e-4,
            max_steps=4_800,
        ),
        # Minutes on two cores. The vocabulary is most of its work, so a smaller network would hardly be faster.
        BaseRun(
            preset="quickstart",
            num_hidden_layers=6,
            num_attention_heads=4,
            hidden_size=256,
            max_position_embeddings=256,
            dataset_name="pydocs",
            streaming=False,
            max_eval_rows=64,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=2e-3,
            warmup_steps=20,
            max_steps=200,
            logging_steps=10,
            eval_steps=100,
            eval_tasks="pydocs-choice",
            eval_task_limit=128,
            eval_task_steps=400,
            sample_steps=100,
            save_steps=200,
            save_total_limit=1,
        ),
    )
}

SomeRun = TypeVar("SomeRun", bound=Run)
Described = TypeVar("Described", bound=TextSource)


def parse_run(kind: type[SomeRun], presets: Mapping[str, SomeRun], arguments: Sequence[str]) -> SomeRun:
    """The run that a command line describes: a preset, changed by `--config FILE.yaml`, changed by the flags.

    Raises:
        ValueError: one line that says what was given and what would work.
    """
    first = _Parser(add_help=False)
    first.add_argument("--preset", default=kind.preset)
    first.add_argument("--config", type=Path, help="a YAML file of these names, such as another run's run.yaml")
    config = first.parse_known_args(arguments)[0].config
    arguments = [*(_flags_of(config) if config else ()), *arguments]  # of two equal flags the later one counts
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}: the presets are {', '.join(presets)}")

    parser = _Parser(kind, parents=[first], conflict_handler="resolve")
    rows = parser._option_string_actions["--per_device_train_batch_size"]
    parser.add_argument("--per_device_train_batch_size", action=_RowsOrAuto, type=_rows_or_auto, help=rows.help)
    parser.set_defaults(**asdict(presets[preset]))
    run, _, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(_unknown_flag(unknown[0], [field.name for field in fields(kind)]))
    return run


def flags(kind: type[Any]) -> ArgumentParser:
    """A parser of the flags of such a description, to be the parent of a subcommand's."""
    return _Parser(kind, add_help=False)


def from_flags(kind: type[Described], options: Namespace) -> Described:
    """The description that these flags make."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def command_line(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the process's arguments; what a user can mend ends it with one line and exit code 2.

    `FGPT_TRACEBACK=1` shows where the error came from.
    """
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("FGPT_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class _Parser(HfArgumentParser):
    """Takes `--flag` for `--flag true`, no abbreviations, and raises what argparse would print under its usage."""

    def __init__(self, kind: Any = None, **options: Any) -> None:
        super().__init__(kind, allow_abbrev=False, **options)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _RowsOrAuto(Action):
    """A number of rows replaces the preset's; `auto` leaves it, since it says what a step is, and has it divided."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        namespace.auto_find_batch_size = value is None
        if value is not None:
            namespace.per_device_train_batch_size = value


def _rows_or_auto(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is neither a number of rows nor auto") from error


def _flags_of(config: Path) -> list[str]:
    if not config.is_file():
        raise ValueError(f"--config {config}: there is no such file")
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {config} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {config} must hold lines of 'name: value'")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def _unknown_flag(flag: str, names: Sequence[str]) -> str:
    name = flag.split("=")[0].lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown argument {flag!r}: {f'did you mean --{close[0]}?' if close else '--help lists all of them'}"
