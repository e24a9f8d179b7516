"""Runs: their fields are the command line, their instances the presets, and their YAML the record.

Each group of options is a data class, and a run inherits from its groups. Python collects the fields of a data class
from its last base to its first, so `--help` and `run.yaml` show the groups of the last base first.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import yaml

from fgpt_hf.config.data_options import DatasetOptions, Documents, TextSource
from fgpt_hf.config.option_groups import (
    ATTENTIONS,
    KERNEL_OWNER,
    CheckpointOptions,
    EvaluationOptions,
    HardwareOptions,
    HubOptions,
    LanguageModelLossOptions,
    NetworkOptions,
    OptimizationOptions,
    RunOptions,
    StartOptions,
    is_hub_kernel,
)
from fgpt_hf.config.options import check_limits, described_fields, option
from fgpt_hf.config.tuning_options import LoRAOptions, PreferenceLossOptions
from fgpt_hf.errors import UserError

DEFAULT_CONTEXT = 2048  # lm-evaluation-harness' own, for models and tokenizers that name none


@dataclass(frozen=True, kw_only=True)
class Run(
    HubOptions, CheckpointOptions, EvaluationOptions, HardwareOptions, OptimizationOptions, RunOptions
):  # in the reverse order of `--help`: see the top of this file
    """The options that every kind of training has, by the names of transformers' `TrainingArguments`."""

    # The stage of training in one word.
    stage: ClassVar[str] = "base"
    # The number of sequences in a row.
    sequences_per_row: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_limits(self)
        if self.bf16 and self.fp16:
            raise UserError("bf16 and fp16 exclude each other: give one of them")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise UserError("overwrite_output_dir and resume_from_checkpoint exclude each other: give one of them")
        if self.attn_implementation not in ATTENTIONS and not is_hub_kernel(self.attn_implementation):
            raise UserError(
                f"attn_implementation={self.attn_implementation!r} is unknown: choose from {', '.join(ATTENTIONS)}, or "
                f"a kernel of the Hub such as {KERNEL_OWNER}flash-attn3"
            )
        if self.push_to_hub and self.hub_model_id is None:
            raise UserError("push_to_hub=true needs hub_model_id=user/name")
        if self.hub_strategy in ("checkpoint", "all_checkpoints") and not self.push_to_hub:
            raise UserError(f"hub_strategy={self.hub_strategy} needs push_to_hub=true and hub_model_id=user/name")
        if self.hub_model_id is not None and not self.push_to_hub and self.resume_from_checkpoint is None:
            raise UserError(
                f"hub_model_id={self.hub_model_id} has no effect without push_to_hub=true: add --push_to_hub, or leave "
                "it out"
            )
        if self.resume_from_checkpoint == "hub" and self.hub_model_id is None:
            raise UserError("resume_from_checkpoint=hub needs hub_model_id=user/name; or give user/name@branch")

    @property
    def folder(self) -> Path:
        """The folder of the run: `output_dir`, or the names of preset and stage under `runs/`."""
        suffix = "" if self.stage == "base" else f"-{self.stage}"
        return Path(self.output_dir or f"runs/{self.preset}{suffix}")

    @property
    def start_model(self) -> str | None:
        """The model that the run starts from, or None for a new network."""
        return getattr(self, "model_name_or_path", None)

    @classmethod
    def fixed_on_resume(cls) -> list[str]:
        """Return the names of the options that a resumed run must have as they were recorded."""
        return [field.name for field, described in described_fields(cls) if described.fixed_on_resume]

    def sequence_length(self, context: int) -> int:
        """Return the maximum number of tokens per sequence, for a model that reads `context` of them."""
        return context

    def rows_per_step(self, processes: int) -> int:
        """Return the number of rows per step on all devices.

        The batch sizes are those of one device, except with `auto_find_batch_size`, where they are those of all.
        """
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return rows if self.auto_find_batch_size else rows * processes

    def to_yaml(self) -> str:
        """Return the run as the text of a file that `--config` reads back, without orders for one start of it."""
        once = {field.name for field, described in described_fields(self) if described.one_time}
        recorded = asdict(self) | {"output_dir": str(self.folder)}
        return yaml.safe_dump({name: recorded[name] for name in recorded if name not in once}, sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class Preparation(TextSource):
    """Where the prepared rows go, and how many of them to make."""

    output_dir: str = option("runs/prepared", "Folder of the prepared rows; an unfinished one is continued.")
    max_train_tokens: int | None = option(
        None, "Stop after about this many training tokens.", unset="prepare all documents"
    )
    hub_dataset_id: str | None = option(None, "Dataset on the Hub to push the rows to as well: user/name.")

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(Documents):
    """What the tokenizer is trained on, its size, and where it goes."""

    output_dir: str = option(MISSING, "New folder for the tokenizer.", positional=True)
    vocab_size: int = option(
        16384, "Number of tokens: the 256 bytes, the merges, and the 6 control tokens, which have the last ids."
    )
    max_characters: int = option(
        1_000_000_000, "Stop reading after about this many characters of documents to train on."
    )

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def source(self) -> TextSource:
        """The documents, as what reads them takes them."""
        return TextSource(**{field.name: getattr(self, field.name) for field in fields(Documents)})


@dataclass(frozen=True, kw_only=True)
class BaseRun(LanguageModelLossOptions, Run, TextSource, NetworkOptions, RunOptions):
    """Base training on documents. The defaults are the published run.

    Example:
        >>> run = BaseRun(preset="mine", dataset_name="documents.jsonl", max_steps=100)
        >>> run.folder.as_posix(), run.rows_per_step(processes=2)
        ('runs/mine', 1024)
    """

    model_name_or_path: str | None = option(
        None,
        "Model to train further, with its own network and tokenizer: its folder, a run's folder, or an id on the Hub.",
        unset="a new network, of the shape that the network options give",
        fixed_on_resume=True,
        group=StartOptions,
    )
    trust_remote_code: bool = option(
        False, "Run the model's own code, if transformers does not know its architecture.", group=StartOptions
    )
    streaming: bool = option(
        True,
        "Read documents while training, instead of preparing all of them first.",
        fixed_on_resume=True,
        group=TextSource,
    )
    verify_rows: bool = option(
        True, "Check the hashes of prepared rows as training begins, and stop if they are damaged.", group=TextSource
    )
    sample_prompt: str = option(
        "Once upon a time",
        "Prompt to continue at every sample, in addition to one from the validation set.",
        group=EvaluationOptions,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer and self.model_name_or_path:
            raise UserError("tokenizer and model_name_or_path exclude each other: a model has its own tokenizer")

    def sequence_length(self, context: int) -> int:
        """Return the length of a row, which may be less than the model reads."""
        return self.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class TuningRun(LoRAOptions, Run, DatasetOptions, StartOptions, RunOptions):
    """The options of runs that start from a trained model, by the names of TRL and PEFT."""

    max_steps: int = option(
        0, "Number of optimizer steps of the whole run; 0 leaves it to num_train_epochs.", minimum=0
    )
    num_train_epochs: float = option(
        1.0, "Number of passes over the data, where max_steps is 0.", group=OptimizationOptions
    )
    max_eval_rows: int = option(256, "Maximum number of rows in the fixed validation set.")
    validation_prompts: int = option(
        13, "Number of prompts from the validation set that are answered at every sample.", group=EvaluationOptions
    )
    max_new_tokens: int = option(64, "Maximum number of tokens of a sampled answer.", group=EvaluationOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_peft and self.fsdp:
            raise UserError("use_peft and fsdp exclude each other: adapters need no sharding, so leave fsdp out")
        if self.load_in_4bit and not self.use_peft:
            raise UserError("load_in_4bit needs use_peft: 4-bit weights cannot be trained, only adapters on them")

    def sequence_length(self, context: int) -> int:
        """Return `max_length`, or the whole context if that is not set.

        Args:
            context: 0 for a model whose configuration names none.

        Raises:
            UserError: `max_length` is longer than the context.
        """
        length = self.max_length or context or DEFAULT_CONTEXT
        if 0 < context < length:
            raise UserError(f"max_length={length} is longer than the model's context of {context} tokens")
        return length


@dataclass(frozen=True, kw_only=True)
class InstructRun(LanguageModelLossOptions, TuningRun):
    """Instruction tuning on conversations.

    Example:
        >>> InstructRun(model_name_or_path="runs/mine", max_length=256, use_peft=True).sequence_length(context=1024)
        256
    """

    stage: ClassVar[str] = "instruct"

    assistant_only_loss: bool = option(
        True,
        "Compute the loss on the assistant's replies only, instead of on whole conversations.",
        fixed_on_resume=True,
        group=DatasetOptions,
    )


@dataclass(frozen=True, kw_only=True)
class PreferenceRun(PreferenceLossOptions, TuningRun):
    """Preference optimization on pairs of replies: the chosen one becomes more likely than the rejected one.

    Example:
        >>> PreferenceRun(loss_type="ipo", label_smoothing=0.1)
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: label_smoothing has no meaning for loss_type=ipo: leave it out
    """

    stage: ClassVar[str] = "preference"
    sequences_per_row: ClassVar[int] = 2  # chosen and rejected

    dataset_name: str = option(
        "HuggingFaceH4/ultrafeedback_binarized",
        "Preference pairs to train on: a known dataset, one on the Hub, or a file, a folder or a glob of files; or a "
        "mixture NAME:MAX_ROWS*REPEATS,… that takes at most MAX_ROWS of each, REPEATS times an epoch.",
        fixed_on_resume=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss_type == "ipo":
            raise UserError("label_smoothing has no meaning for loss_type=ipo: leave it out")


def kind_of_run(recorded: Mapping[str, object]) -> type[Run]:
    """Return the kind of run that the options in a `run.yaml` describe.

    Example:
        >>> kind_of_run({"preset": "quickstart", "loss_type": "sigmoid"}).stage
        'preference'
    """
    if "loss_type" in recorded:
        return PreferenceRun
    return InstructRun if "assistant_only_loss" in recorded else BaseRun
