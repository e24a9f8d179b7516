"""What a run takes, from its shape alone: parameters, arithmetic, memory, and the micro-batch that fits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fgpt_hf.configuration_fgpt import FGPTConfig
from fgpt_hf.devices import Machine
from fgpt_hf.objectives import logit_rows, softmax_rows
from fgpt_hf.presets import PRESETS
from fgpt_hf.runs import BaseRun, Run

USABLE_SHARE = 0.9  # of the memory: allocators lose some between their blocks
FLOAT, LOW = 4, 2  # bytes of a float32, and of a bfloat16 or float16


class Parameters(NamedTuple):
    """How many there are: in the layers' matrices, in the token and the position embeddings, and in the rest."""

    matrices: int
    tokens: int
    positions: int
    vectors: int

    @property
    def total(self) -> int:
        return sum(self)


class Memory(NamedTuple):
    """Bytes that each device holds of each kind, and whether gradients stay while a further micro-batch runs."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int
    gradients_stay: bool

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """A step's only micro-batch trades its activations for gradients; the next ones find gradients there."""
        moving = self.activations + self.loss + self.working
        moving = moving + self.gradients if self.gradients_stay else max(moving, self.gradients)
        return self.weights + self.optimizer + moving


def network(run: BaseRun) -> FGPTConfig:
    """The shape of the network that a run trains."""
    return FGPTConfig(
        hidden_size=run.hidden_size,
        num_hidden_layers=run.num_hidden_layers,
        num_attention_heads=run.num_attention_heads,
        max_position_embeddings=run.max_position_embeddings,
        embedding_dropout=run.dropout,
        residual_dropout=run.dropout,
        attention_dropout=run.dropout,
    )


def parameters(config: FGPTConfig) -> Parameters:
    """The parameters of a network of this shape, each once."""
    width, layers, inner = config.hidden_size, config.num_hidden_layers, _inner_width(config)
    layer_vectors = 4 * width + 4 * width * config.attention_bias + (inner + width) * config.mlp_bias
    return Parameters(
        matrices=layers * (4 * width**2 + 2 * width * inner),
        tokens=config.vocab_size * width * (1 if config.tie_word_embeddings else 2),
        positions=config.max_position_embeddings * width,
        vectors=layers * layer_vectors + 2 * width,
    )


def flops_per_token(config: FGPTConfig) -> int:
    """Operations of a token's forward and backward pass: 6 N + 12 layers * width * context.

    Chowdhery et al. 2022 (PaLM), appendix B; as in nanoGPT, N leaves out the position embeddings, which are looked up
    and not multiplied, and nothing is taken off for the causal mask or added for recomputed activations.
    """
    counts = parameters(config)
    attention = 12 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    return 6 * (counts.total - counts.positions) + attention


def mfu(config: FGPTConfig, tokens_per_second: float, machine: Machine) -> float | None:
    """Model FLOPs utilisation: the share of all devices' bfloat16 peak, or None where that is not known."""
    if machine.peak_flops is None:
        return None
    return flops_per_token(config) * tokens_per_second / (machine.peak_flops * machine.processes)


def memory(run: Run, config: FGPTConfig, machine: Machine, rows: int, micro_batches: int) -> Memory:
    """What a device holds when it trains on `micro_batches` a step, each `rows` rows of the whole context."""
    counts = parameters(config)
    low = is_low_precision(run, machine)
    adamw_values = 2 * counts.total - (counts.matrices if run.optim == "muon" else 0)  # Muon has one a parameter
    copies = 1
    if machine.processes > 1 and not run.fsdp:
        copies = 2  # DDP gathers gradients in buckets of their own
    sharing = machine.processes if run.fsdp else 1
    whole = 0
    if sharing > 1:  # embeddings stay gathered throughout a pass, layers while they and the next one compute
        whole = counts.tokens + counts.positions + 2 * counts.matrices // config.num_hidden_layers
    return Memory(
        weights=FLOAT * (counts.total // sharing + whole) + LOW * counts.matrices * low,  # autocast's copies
        gradients=FLOAT * (copies * counts.total // sharing + whole),
        optimizer=FLOAT * adamw_values // sharing,
        activations=_activations(run, config, low) * rows * config.max_position_embeddings,
        loss=_loss(config, machine, low, rows * config.max_position_embeddings),
        # The gradients within the layer that is being differentiated, and the look-up's, dense beside the head's.
        working=_layer_activations(run, config, low) * rows * config.max_position_embeddings + FLOAT * counts.tokens,
        gradients_stay=micro_batches > 1,
    )


def largest_micro_batch(run: Run, config: FGPTConfig, machine: Machine) -> int | None:
    """The most rows, a power of two, that fit the memory and divide a device's rows of a step; None if not even one."""
    best = None
    for rows in _powers_of_two(rows_on_device(run, machine)):
        need = memory(run, config, machine, rows, rows_on_device(run, machine) // rows)
        if need.total <= USABLE_SHARE * machine.memory_bytes:
            best = rows
    return best


def rows_on_device(run: Run, machine: Machine) -> int:
    """The rows of a step that one device trains on.

    A run that leaves its micro-batch open says by its numbers what all devices do together, else what each does.

    Raises:
        ValueError: the rows of a step do not divide among the processes.
    """
    rows = run.rows_of_step(machine.processes)
    if rows % machine.processes:
        raise ValueError(
            f"per_device_train_batch_size=auto: {rows} rows a step do not divide among {machine.processes} processes; "
            "give per_device_train_batch_size and gradient_accumulation_steps as numbers"
        )
    return rows // machine.processes


def is_low_precision(run: Run, machine: Machine) -> bool:
    """Whether products are bfloat16 or float16, as the run asks or else the machine has them."""
    return run.fp16 or (machine.has_bf16 if run.bf16 is None else run.bf16)


def remedies(run: Run, config: FGPTConfig, machine: Machine) -> list[str]:
    """Which changes, each by itself, let at least one row fit such devices."""
    found = []
    for processes in (2, 4, 8, 16, 32, 64):
        if processes > machine.processes and _fits(replace(run, fsdp=True), config, machine, processes):
            found.append(f"--fsdp on {processes} such devices")
            break
    if not run.gradient_checkpointing and _fits(replace(run, gradient_checkpointing=True), config, machine):
        found.append("--gradient_checkpointing")
    smaller = (preset for preset in PRESETS.values() if parameters(network(preset)).total < parameters(config).total)
    return found + [f"--preset {preset.preset}" for preset in smaller if _fits(preset, network(preset), machine)]


def _fits(run: Run, config: FGPTConfig, machine: Machine, processes: int | None = None) -> bool:
    machine = machine._replace(processes=processes or machine.processes)
    return memory(run, config, machine, 1, 2).total <= USABLE_SHARE * machine.memory_bytes


def _activations(run: Run, config: FGPTConfig, low: bool) -> int:
    """Bytes that a token leaves for the backward pass."""
    layer = _layer_activations(run, config, low)
    ends = 3 * FLOAT * config.hidden_size  # the embeddings, the last normalisation's input and output
    if run.gradient_checkpointing:
        return config.num_hidden_layers * FLOAT * config.hidden_size + layer + ends
    return config.num_hidden_layers * layer + ends


def _layer_activations(run: Run, config: FGPTConfig, low: bool) -> int:
    """Bytes that a token leaves in a layer.

    Both normalisations' inputs in float32; what each product multiplies, of which autocast makes a copy for each of the
    three that share it; queries, keys and values; the activation's input and output.
    """
    width, inner = config.hidden_size, _inner_width(config)
    products = LOW * (8 * width + 2 * inner) if low else FLOAT * (6 * width + 2 * inner)
    return 2 * FLOAT * width + products + _attention_weights(run, config, low)


def _attention_weights(run: Run, config: FGPTConfig, low: bool) -> int:
    """Bytes of a token's attention weights in a layer, or of the mask that keeps packed documents apart."""
    if run.attn_implementation == "eager":
        return (FLOAT + LOW * low) * config.num_attention_heads * config.max_position_embeddings
    return (LOW if low else FLOAT) * config.max_position_embeddings


def _loss(config: FGPTConfig, machine: Machine, low: bool, tokens: int) -> int:
    """Bytes of the states and their gradients, the embeddings' copy and gradient, and one chunk of logits."""
    size = LOW if low else FLOAT
    states = tokens * config.hidden_size * (3 * FLOAT + LOW * low)
    embeddings = config.vocab_size * config.hidden_size * (FLOAT + LOW * low)
    logits = min(tokens, logit_rows(machine.kind, torch.bfloat16 if low else torch.float32))
    softmax = min(logits, softmax_rows(machine.kind))
    return states + embeddings + config.vocab_size * (size * logits + FLOAT * softmax)


def _inner_width(config: FGPTConfig) -> int:
    assert config.intermediate_size is not None  # the config derives it
    return config.intermediate_size


def _powers_of_two(number: int) -> Iterator[int]:
    """Those that divide a number, ascending."""
    power = 1
    while number % power == 0:
        yield power
        power *= 2
