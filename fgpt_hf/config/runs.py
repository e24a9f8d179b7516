"""The typed description of a run: its fields are the command line, its instances the presets, its YAML the record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from transformers.hf_argparser import HfArg

from fgpt_hf.errors import UserError

Schedule = Literal["cosine", "linear", "warmup_stable_decay", "constant"]
Optimizer = Literal["muon", "adamw"]
PreferenceLoss = Literal["sigmoid", "ipo", "simpo"]
Tracker = Literal["none", "trackio", "tensorboard", "wandb"]
TokenInit = Literal["mean", "keep"]
BadRows = Literal["skip", "refuse"]
LongRows = Literal["cut", "skip", "refuse"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]

FRACTIONS = ("dropout", "lora_dropout", "validation_fraction", "adam_beta1", "adam_beta2")


def option(default: Any, help: str) -> Any:
    """A field of a run: its default and the sentence that `--help` says of it."""
    return HfArg(default=default, help=help)


def require_amounts(values: Mapping[str, Any], may_be_zero: Sequence[str] = ()) -> None:
    """Raise UserError for the first number that is not finite and above zero, or not zero where that has a meaning."""
    for name, value in values.items():
        least = "zero or more" if name in may_be_zero else "above zero"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not math.isfinite(value):
            raise UserError(f"{name}={value} must be a finite number")
        if is_number and (value < 0 or (value == 0 and name not in may_be_zero)):
            raise UserError(f"{name}={value} must be {least}")


def require_fractions(values: Mapping[str, Any]) -> None:
    """Raise UserError for the first of the values that are shares, by their names, that is not below 1."""
    for name in FRACTIONS:
        if name in values and values[name] >= 1:
            raise UserError(f"{name}={values[name]} must be a share below 1")


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
        require_fractions(asdict(self))
        if self.min_lr_ratio > 1:
            raise UserError(f"min_lr_ratio={self.min_lr_ratio} must be a share of the peak, 1 at most")
        if self.bf16 and self.fp16:
            raise UserError("bf16 and fp16 exclude each other: give one of them")
        if self.push_to_hub and self.hub_model_id is None:
            raise UserError("push_to_hub=true needs hub_model_id=user/name")
        if self.output_dir is None:
            self.output_dir = f"runs/{self.preset}{self.folder_ending}"

    may_be_zero: ClassVar[Sequence[str]] = ("seed", "warmup_steps", "min_lr_ratio", "weight_decay")
    # What a resumed run must have as it was, because weights, data or optimizer state depend on it.
    lasting: ClassVar[Sequence[str]] = ("preset", "seed", "optim")
    # What tells the default folder of this kind of run from that of the base run of the same preset.
    folder_ending: ClassVar[str] = ""
    # The sequences of a row.
    sequences: ClassVar[int] = 1

    def length(self, context: int) -> int:
        """The most tokens of a sequence, for a model that reads `context` of them."""
        return context

    @property
    def task_names(self) -> list[str]:
        """The benchmarks that the run is measured by."""
        return [name for name in (self.eval_tasks or "").split(",") if name]

    @property
    def folder(self) -> Path:
        return Path(str(self.output_dir))

    def rows_of_step(self, processes: int) -> int:
        """The rows of a step on all devices, which a run that leaves its micro-batch open says by its numbers."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return rows if self.auto_find_batch_size else rows * processes

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
    validation_fraction: float = option(0.01, "share of the documents that is never trained on")
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
        require_fractions(asdict(self))


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
        "validation_fraction",
    )

    hidden_size: int = option(1296, "width of the network")
    num_hidden_layers: int = option(32, "layers")
    num_attention_heads: int = option(24, "attention heads; they divide the width")
    dropout: float = option(0.0, "of embeddings, attention and residuals")

    streaming: bool = option(True, "read documents as training goes, instead of preparing all of them first")
    max_eval_rows: int = option(512, "rows of the fixed held-out set")
    sample_prompt: str = option("Once upon a time", "continued as training goes, with one of the corpus")


@dataclass(kw_only=True)
class TuningRun(Run):
    """What the runs that begin with a trained model have in common. The names are those of TRL and PEFT."""

    may_be_zero: ClassVar[Sequence[str]] = (*Run.may_be_zero, "max_steps", "lora_dropout")
    lasting: ClassVar[Sequence[str]] = (
        *Run.lasting,
        "model_name_or_path",
        "dataset_name",
        "dataset_config_name",
        "dataset_revision",
        "dataset_train_split",
        "validation_fraction",
        "max_length",
        "bad_rows",
        "long_rows",
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
    )

    model_name_or_path: str = option("runs/fgpt-712m", "the model to begin with: its folder, a run's, or a Hub id")
    new_token_init: TokenInit = option(
        "mean", "rows of role tokens that the model has never seen: the mean of the embeddings, or kept as they are"
    )
    max_steps: int = option(0, "optimizer steps of the whole run (0: as num_train_epochs says)")
    num_train_epochs: float = option(1.0, "how often the run sees all of its data, where max_steps is 0")

    dataset_name: str = option(
        "smol-smoltalk", "what to learn from, or a mixture NAME:MOST*TIMES,…: at most so many rows, so often an epoch"
    )
    dataset_config_name: str | None = option(None, "configuration of Hub data sets that have no short name")
    dataset_revision: str | None = option(None, "commit of such a data set (default: the newest)")
    dataset_train_split: str = option("train", "split of such a data set")
    validation_fraction: float = option(0.05, "share of the rows that is never trained on, by a hash of each")
    max_eval_rows: int = option(256, "rows of the fixed held-out set")
    max_length: int | None = option(None, "tokens of a training row (default: the model's context)")
    bad_rows: BadRows = option("skip", "rows that are not what they should be: left out and told, or refused")
    long_rows: LongRows = option("cut", "rows longer than max_length: cut, left out, or refused; told in any case")
    validation_prompts: int = option(13, "prompts of held-out conversations, answered before and after")
    max_new_tokens: int = option(64, "longest answer to a prompt, in tokens")

    use_peft: bool = option(False, "train LoRA adapters and role tokens only, with PEFT")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: float = option(32, "the adapters' work is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "of what goes into the adapters")
    lora_target_modules: str = option("all-linear", "names of the adapted layers, separated by commas, or all-linear")
    merge_adapter: bool = option(True, "leave a whole model; false leaves the adapter alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_peft and self.fsdp:
            raise UserError("use_peft and fsdp exclude each other: adapters are small enough without sharing")

    def length(self, context: int) -> int:
        """`max_length`, or the whole context where that is open; UserError where it is more than the context."""
        length = self.max_length or context
        if length > context:
            raise UserError(f"max_length={length} is more than the {context} tokens that the model reads")
        return length


@dataclass(kw_only=True)
class InstructRun(TuningRun):
    """Instruction tuning: conversations, and what of them is learnt."""

    lasting: ClassVar[Sequence[str]] = (*TuningRun.lasting, "assistant_only_loss")
    folder_ending: ClassVar[str] = "-instruct"

    assistant_only_loss: bool = option(True, "learn the assistant's replies only, not what is said to it")


@dataclass(kw_only=True)
class PreferenceRun(TuningRun):
    """Preference optimisation: pairs of replies, of which the chosen one is to be the likelier. The names are TRL's."""

    may_be_zero: ClassVar[Sequence[str]] = (*TuningRun.may_be_zero, "label_smoothing", "simpo_gamma")
    lasting: ClassVar[Sequence[str]] = (*TuningRun.lasting, "loss_type", "beta", "label_smoothing", "simpo_gamma")
    folder_ending: ClassVar[str] = "-preference"
    sequences: ClassVar[int] = 2  # chosen and rejected

    dataset_name: str = option(
        "HuggingFaceH4/ultrafeedback_binarized",
        "pairs to learn from, or a mixture NAME:MOST*TIMES,…: at most so many rows, so often an epoch",
    )
    loss_type: PreferenceLoss = option("sigmoid", "sigmoid: DPO; ipo: IPO; simpo: SimPO, which has no reference model")
    beta: float = option(0.1, "how much rewards count against the distance from the model before training")
    label_smoothing: float = option(0.0, "share of pairs that may be the wrong way round; not for ipo")
    simpo_gamma: float = option(0.5, "the margin that simpo is to reach")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing >= 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing} must be below 0.5, or nothing is preferred")
        if self.label_smoothing and self.loss_type == "ipo":
            raise UserError("label_smoothing has no meaning for loss_type=ipo: leave it out")
