"""Groups of options: each is a data class that `--help` shows under its name and docstring."""

import re
from dataclasses import dataclass
from typing import Literal

from fgpt_hf.config.options import option
from fgpt_hf.config.schedules import SCHEDULES

Tracker = Literal["none", "trackio", "tensorboard", "wandb"]
TokenInit = Literal["mean", "keep"]
HubStrategy = Literal["end", "every_save", "checkpoint", "all_checkpoints"]
ATTENTIONS = ("auto", "sdpa", "eager", "varlen_attention", "flex_attention", "flash_attention_2", "flash_attention_3")
KERNEL_OWNER = "kernels-community/"  # on the Hub; transformers loads no attention of others


def is_hub_kernel(name: str) -> bool:
    """Return whether an attention implementation is a kernel of the Hub, which its package `kernels` fetches.

    Example:
        >>> is_hub_kernel("kernels-community/flash-attn3"), is_hub_kernel("somebody/kernel"), is_hub_kernel("sdpa")
        (True, False, False)
    """
    return re.fullmatch(rf"{KERNEL_OWNER}[\w.-]+(@[\w.-]+)?(:\w+)?", name) is not None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run starts from and where it writes."""

    preset: str = option(
        "fgpt-712m", "Named run to start from, which every other option changes.", fixed_on_resume=True
    )
    output_dir: str | None = option(
        None,
        "Folder of the run.",
        unset="runs/PRESET, plus -instruct or -preference in those stages",
    )
    overwrite_output_dir: bool = option(
        False, "Delete the run that output_dir already holds, and start over.", one_time=True
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint to resume from, exactly: a folder under checkpoints/; 'latest', which starts the run if nothing is "
        "saved yet; 'hub', the state that --hub_strategy checkpoint uploads, if it is newer than output_dir; or "
        "user/name@branch. Needed only to change options: the same command resumes its unfinished run by itself.",
        unset="start the run, or resume it if it is unfinished",
        one_time=True,
    )
    seed: int = option(
        1337,
        "Random seed for initialization, data order and dropout.",
        minimum=0,
        maximum=2**32 - 1,  # NumPy's
        fixed_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The shape of the network and its blocks. The defaults are GPT-2's."""

    hidden_size: int = option(1296, "Width of the hidden states.", fixed_on_resume=True)
    intermediate_size: int | None = option(
        None,
        "Width of the MLPs.",
        unset="4 hidden_size, or for gated ones 8/3 of it rounded up to a multiple of 64",
        fixed_on_resume=True,
    )
    num_hidden_layers: int = option(32, "Number of layers.", fixed_on_resume=True)
    num_attention_heads: int = option(
        24,
        "Number of attention heads per layer; must divide hidden_size, unless head_dim is given.",
        fixed_on_resume=True,
    )
    num_key_value_heads: int | None = option(
        None,
        "Number of key and value heads per layer, each shared by equally many attention heads.",
        unset="num_attention_heads",
        fixed_on_resume=True,
    )
    head_dim: int | None = option(
        None, "Size of an attention head.", unset="hidden_size / num_attention_heads", fixed_on_resume=True
    )
    position_embedding: str = option("learned", "Positions: learned (a table) or rope (rotary).", fixed_on_resume=True)
    rope_theta: float | None = option(
        None, "Base of the wavelengths of rotary positions.", unset="10000", fixed_on_resume=True
    )
    norm: str = option("layernorm", "Normalization: layernorm or rmsnorm.", fixed_on_resume=True)
    norm_elementwise_affine: bool = option(True, "Give normalizations weights.", fixed_on_resume=True)
    norm_bias: bool | None = option(
        None, "Give normalizations biases.", unset="true for layernorm with weights", fixed_on_resume=True
    )
    embedding_norm: bool = option(False, "Normalize the embeddings before the first layer.", fixed_on_resume=True)
    qk_norm: bool = option(False, "Normalize the queries and keys of each head.", fixed_on_resume=True)
    mlp: str = option(
        "plain", "MLP: plain (two matrices) or gated (three; SwiGLU with --hidden_act silu).", fixed_on_resume=True
    )
    hidden_act: str = option(
        "gelu_pytorch_tanh",
        "Activation of the MLP: any name of transformers, such as gelu, relu2 or silu.",
        fixed_on_resume=True,
    )
    attention_bias: bool = option(True, "Give the attention's projections biases.", fixed_on_resume=True)
    mlp_bias: bool = option(True, "Give the MLP's projections biases.", fixed_on_resume=True)
    tie_word_embeddings: bool = option(True, "Share the token embeddings with the output head.", fixed_on_resume=True)
    zero_init_residual: bool = option(
        False, "Start the projections that feed the residual stream at zero.", fixed_on_resume=True
    )
    final_logit_softcapping: float | None = option(
        None, "Cap logits smoothly at plus and minus this number.", unset="no cap", fixed_on_resume=True
    )
    dropout: float = option(0.0, "Dropout probability for embeddings, attention and residuals.", minimum=0, below=1)


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The model that training starts from."""

    model_name_or_path: str = option(
        "runs/fgpt-712m", "Model to start from: its folder, a run's folder, or an id on the Hub.", fixed_on_resume=True
    )
    new_token_init: TokenInit = option(
        "mean",
        "Embeddings of role tokens that the model has never seen: the mean of all embeddings, or as they are.",
        fixed_on_resume=True,
    )
    trust_remote_code: bool = option(False, "Run the model's own code, if transformers does not know its architecture.")


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How long the run trains, on how many rows a step, and how the optimizer moves the weights."""

    max_steps: int = option(27_000, "Number of optimizer steps of the whole run.")
    max_minutes: float | None = option(
        None,
        "Time for the whole run, from start to end, instead of max_steps: such as 30 (minutes), 90s, 2h or 1.5d. A few "
        "timed steps decide how many steps fit.",
        unset="as long as max_steps takes",
    )
    per_device_train_batch_size: int = option(
        16, "Rows in each micro-batch on each device; 'auto' is the same as --auto_find_batch_size."
    )
    auto_find_batch_size: bool = option(
        False, "Choose the largest micro-batch that fits in memory; the effective batch size does not change."
    )
    gradient_accumulation_steps: int = option(32, "Number of micro-batches per step on each device.")
    learning_rate: float = option(2.5e-4, "Peak learning rate.")
    warmup_steps: int = option(
        700, "Number of steps over which the learning rate rises linearly to its peak.", minimum=0
    )
    lr_scheduler_type: str = option("cosine", "Learning rate schedule after the warm-up.", choices=tuple(SCHEDULES))
    min_lr_ratio: float = option(
        0.1,
        "Final learning rate of cosine and warmup_stable_decay, as a fraction of the peak.",
        minimum=0,
        maximum=1,
    )
    lr_decay_ratio: float = option(
        1.0,
        "Last fraction of the steps after the warm-up, over which the learning rate follows its schedule; before that "
        "it stays at its peak.",
        maximum=1,
    )
    optim: str = option(
        "muon",
        "Optimizer of the matrices inside the layers: muon or adamw. All other parameters use AdamW.",
        fixed_on_resume=True,
    )
    weight_decay: float = option(0.1, "Decoupled weight decay, applied to matrices only.", minimum=0)
    weight_decay_scheduler_type: str = option(
        "constant", "Schedule of the weight decay over the run; all but constant end at zero.", choices=tuple(SCHEDULES)
    )
    muon_momentum: float = option(0.95, "Decay rate of Muon's momentum.", below=1)
    adam_beta1: float = option(0.9, "Decay rate of AdamW's first moment.", below=1)
    adam_beta2: float = option(0.95, "Decay rate of AdamW's second moment.", below=1)
    max_grad_norm: float = option(1.0, "Clip gradients to this norm.")
    print_groups: bool = option(
        False, "Log at the start which optimizer and weight decay each kind of parameter has.", one_time=True
    )
    max_bad_steps: int = option(10, "Stop the run after this many unusable steps in a row, such as non-finite ones.")


@dataclass(frozen=True, kw_only=True)
class LanguageModelLossOptions:
    """The loss of base training and instruction tuning."""

    sampled_softmax: int | None = option(
        None,
        "Estimate the training loss from this many tokens of the vocabulary: those that the batch predicts, and a "
        "random sample of the others. Faster if the vocabulary is most of a small network. Validation uses all tokens.",
        unset="all of them",
        group=OptimizationOptions,
    )


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """Number formats, and ways to trade time for memory."""

    bf16: bool | None = option(None, "Compute in bfloat16.", unset="where the hardware supports it")
    fp16: bool = option(False, "Compute in float16 with loss scaling, for GPUs without bfloat16.")
    torch_compile: bool = option(False, "Compile the network with torch.compile.")
    fsdp: bool = option(False, "Shard weights, gradients and optimizer state across all processes (FSDP2).")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory for a third more work."
    )
    attn_implementation: str = option(
        "auto",
        "Attention: auto, sdpa, eager, varlen_attention (torch's kernel for packed rows), flex_attention, "
        "flash_attention_2, flash_attention_3, or a kernel of the Hub such as kernels-community/flash-attn3. On CUDA "
        "in bfloat16 or float16, auto takes flash_attention_3 if installed, or else varlen_attention; elsewhere sdpa.",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured during training, and how often. All of it is also measured before and after."""

    eval_steps: int = option(500, "Number of steps between measurements of the validation loss.")
    max_eval_rows: int = option(512, "Maximum number of rows in the fixed validation set.")
    eval_tasks: str | None = option(None, "Benchmarks to run, separated by commas; see fgpt evaluate --help.")
    eval_task_steps: int = option(2000, "Number of steps between runs of the benchmarks.")
    eval_task_limit: int | None = option(None, "Run only this many examples of each benchmark.", unset="all of them")
    sample_steps: int = option(1000, "Number of steps between generated samples.")

    @property
    def task_names(self) -> list[str]:
        """The benchmarks that the run is measured by."""
        return [name for name in (self.eval_tasks or "").split(",") if name]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What the run saves and logs."""

    save_steps: int = option(1000, "Number of steps between checkpoints.")
    save_total_limit: int = option(3, "Number of checkpoints to keep; older ones are deleted.")
    logging_steps: int = option(10, "Number of steps between lines of metrics.jsonl.")
    profile: int = option(
        0,
        "Number of steps to profile, after the first two; a trace and a table are written to profile/ in output_dir.",
        minimum=0,
        one_time=True,
    )
    report_to: Tracker = option("none", "Tracker that also receives every line of metrics.jsonl.")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Whether and where the model is published on the Hugging Face Hub."""

    push_to_hub: bool = option(False, "Publish the finished model, and during training what hub_strategy says.")
    hub_model_id: str | None = option(None, "Repository to publish to: user/name.")
    hub_strategy: HubStrategy = option(
        "every_save",
        "What to upload: end, the finished model; every_save, also the model of each checkpoint; checkpoint, also the "
        "newest state to resume from, on the branch last-checkpoint; all_checkpoints, also each state, on a branch of "
        "its own, step_….",
    )
    hub_private_repo: bool = option(False, "Make a newly created repository private.")

    @property
    def keeps_state_on_hub(self) -> bool:
        """Whether the run uploads the whole state to resume from."""
        return self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints")
