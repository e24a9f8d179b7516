"""Estimate parameters, FLOPs, memory and the largest micro-batch of a run, from its options alone.

The network is counted on torch's meta device, without memory (`model.shapes`).
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from fgpt_hf.config.option_groups import NetworkOptions
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun, PreferenceRun, Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.losses.linear_cross_entropy import logit_rows, softmax_rows
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.lora import adapted_layers, adapter_parameters
from fgpt_hf.model.quantization import BITS_PER_WEIGHT
from fgpt_hf.model.run_tokenizer import vocabulary_of
from fgpt_hf.model.shapes import NetworkShape, shape_of
from fgpt_hf.runtime.hardware import Machine

USABLE_SHARE = 0.9  # of the memory; allocators lose some between their blocks
FLOAT, LOW = 4, 2  # bytes of a float32; of a bfloat16 or float16
Network = PreTrainedConfig | NetworkShape


class ParameterCounts(NamedTuple):
    """Parameters of a network.

    Attributes:
        matrices: of the layers.
        token_embeddings: of the input, and of the output too where both are tied.
        output_head: zero where it is tied.
        vectors: biases and normalizations.
    """

    matrices: int = 0
    token_embeddings: int = 0
    output_head: int = 0
    position_embeddings: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)

    @property
    def multiplied(self) -> int:
        """Those that each token is multiplied with: all but embeddings that are only looked up."""
        return self.total - self.position_embeddings - (self.token_embeddings if self.output_head else 0)


class Memory(NamedTuple):
    """Bytes on each device, by purpose.

    Attributes:
        working: what one layer needs while it is differentiated.
        gradients_stay: whether gradients are kept while a further micro-batch runs.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int
    gradients_stay: bool

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the rows of a micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes at the peak of a step.

        With one micro-batch, activations are freed as gradients are written, so only the larger counts; with
        accumulation both are live.
        """
        moving = self.activations + self.loss + self.working
        moving = moving + self.gradients if self.gradients_stay else max(moving, self.gradients)
        return self.weights + self.optimizer + moving


def network(run: BaseRun) -> FGPTConfig:
    """Return the shape of the network that a run trains, with embeddings for the run's tokenizer.

    Raises:
        UserError: the shape is impossible, such as a width that does not divide among the heads, a switch has an
            unknown value, or there is no such tokenizer.
    """
    options = {each.name: getattr(run, each.name) for each in fields(NetworkOptions)}
    dropout, theta = options.pop("dropout"), options.pop("rope_theta")
    options |= dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), dropout)
    if theta is not None:
        options["rope_parameters"] = {"rope_theta": theta}
    try:
        config = FGPTConfig(**options, **vocabulary_of(run), max_position_embeddings=run.max_position_embeddings)
        shape_of(config)  # the network alone knows the names of its blocks
    except ValueError as error:  # both are published without this package's UserError
        raise UserError(str(error)) from error
    return config


def count_parameters(config: Network) -> ParameterCounts:
    """Count the parameters of a network of this shape.

    Example:
        >>> count_parameters(FGPTConfig()).total
        712035360
    """
    return ParameterCounts(**shape_of(config).sizes)


def count_trained_parameters(run: Run, config: Network) -> ParameterCounts:
    """Count the parameters that the optimizer updates: the network's, or an adapter's instead."""
    if adapter := adapter_parameters(run, config):
        return ParameterCounts(vectors=adapter)
    return count_parameters(config)


def flops_per_token(run: Run, config: Network) -> int:
    """Return the FLOPs of a token's forward and backward pass: 6 N + 12 layers x width x length.

    The formula is that of Chowdhery et al. 2022 (PaLM), appendix B, where width is that of all heads together. As in
    nanoGPT, N leaves out embeddings that are looked up and not multiplied. The causal mask saves nothing, and
    recomputed activations count once. Frozen weights have no gradients, a third of the work, so they count 4 N. The
    embeddings under an adapter do have them, because the rows of the role tokens are trained. Of the output head only
    the tokens of a sampled softmax count.

    Example:
        >>> f"{flops_per_token(PRESETS['fgpt-712m'], network(PRESETS['fgpt-712m'])):.3g}"
        '4.77e+09'
    """
    config = shape_of(config)
    counts, adapter = count_parameters(config), adapter_parameters(run, config)
    length = run.sequence_length(config.max_position_embeddings)
    attention = 12 * config.num_hidden_layers * _heads_width(config) * length
    frozen = counts.matrices + counts.vectors if adapter else 0
    sampled = getattr(run, "sampled_softmax", None) or config.vocab_size
    not_sampled = config.hidden_size * max(0, config.vocab_size - sampled)
    return 6 * (counts.multiplied - not_sampled + adapter) - 2 * frozen + attention


def mfu(run: Run, config: Network, tokens_per_second: float, machine: Machine) -> float | None:
    """Return model FLOPs utilization: the fraction of all devices' bfloat16 peak, or None if that is unknown."""
    if machine.peak_flops is None:
        return None
    return flops_per_token(run, config) * tokens_per_second / (machine.peak_flops * machine.processes)


def memory(run: Run, config: Network, machine: Machine, rows: int, micro_batches: int) -> Memory:
    """Estimate the memory of each device with `micro_batches` per step, each of `rows` rows of the full length."""
    config = shape_of(config)
    counts, trained = count_parameters(config), count_trained_parameters(run, config)
    adapter = adapter_parameters(run, config)
    low = is_low_precision(run, machine)
    tokens = rows * run.sequences_per_row * run.sequence_length(config.max_position_embeddings)
    activations = _activations(run, config, machine) * tokens
    # The small products of adapters fragment a C library's heap by about as much (docs/benchmarks.md).
    holes = activations if adapter and machine.kind == "cpu" else 0
    adamw_values = 2 * trained.total - (trained.matrices if run.optim == "muon" else 0)  # Muon keeps one per parameter
    copies = 2 if machine.processes > 1 and not run.fsdp else 1  # DDP collects gradients in buckets of its own
    sharing = machine.processes if run.fsdp else 1
    whole = whole_gradients = 0
    if sharing > 1:  # embeddings stay gathered for a whole pass, a layer while it and the one before it compute
        whole = counts.total - counts.matrices - counts.vectors + 2 * counts.matrices // config.num_hidden_layers
        whole_gradients = counts.total if micro_batches > 1 else whole  # FSDP shares them after the last micro-batch
    return Memory(
        weights=_weights(run, counts, adapter, sharing) + FLOAT * whole + LOW * low * _low_copies(run, config),
        gradients=FLOAT * (copies * trained.total // sharing + whole_gradients),
        optimizer=FLOAT * adamw_values // sharing,
        activations=activations,
        loss=_loss(config, machine, low, tokens),
        # The gradients within one layer, and the dense gradient of the token look-up next to the head's; with an
        # adapter, a copy of the embeddings with the rows of the role tokens.
        working=_layer_activations(run, config, machine) * tokens + FLOAT * counts.token_embeddings + holes,
        gradients_stay=micro_batches > 1,
    )


def _weights(run: Run, counts: ParameterCounts, adapter: int, sharing: int) -> int:
    """Return the bytes of the weights as they are stored on a device."""
    if isinstance(run, TuningRun) and run.load_in_4bit:
        return FLOAT * (counts.total - counts.matrices + adapter) + int(counts.matrices * BITS_PER_WEIGHT / 8)
    return FLOAT * ((counts.total + adapter) // sharing)


def largest_micro_batch(run: Run, config: Network, machine: Machine) -> int | None:
    """Return the largest power of two of rows that fits the memory and divides a device's rows per step, or None."""
    best = None
    for rows in _powers_of_two(rows_on_device(run, machine)):
        need = memory(run, config, machine, rows, rows_on_device(run, machine) // rows)
        if need.total <= USABLE_SHARE * machine.memory_bytes:
            best = rows
    return best


def rows_on_device(run: Run, machine: Machine) -> int:
    """Return the rows of a step on each device.

    Raises:
        UserError: the rows of a step do not divide among the processes.
    """
    rows = run.rows_per_step(machine.processes)
    if rows % machine.processes:
        raise UserError(
            f"per_device_train_batch_size=auto: {rows} rows per step do not divide among {machine.processes} "
            "processes; give per_device_train_batch_size and gradient_accumulation_steps as numbers"
        )
    return rows // machine.processes


def is_low_precision(run: Run, machine: Machine) -> bool:
    """Return whether products are bfloat16 or float16: as the run asks, or else as the hardware supports."""
    return run.fp16 or (machine.has_bf16 if run.bf16 is None else run.bf16)


def remedies(run: Run, config: Network, machine: Machine) -> list[str]:
    """Return the changes of flags, each of which alone lets at least one row fit such devices."""
    found, config = [], shape_of(config)
    adapted = adapter_parameters(run, config) > 0  # PEFT's layers cannot be sharded
    for processes in () if adapted else (2, 4, 8, 16, 32, 64):
        if processes > machine.processes and _fits(replace(run, fsdp=True), config, machine, processes):
            found.append(f"--fsdp on {processes} such devices")
            break
    if not run.gradient_checkpointing and _fits(replace(run, gradient_checkpointing=True), config, machine):
        found.append("--gradient_checkpointing")
    if isinstance(run, TuningRun):
        return found + _tuning_remedies(run, config, machine)
    smaller = (preset for preset in PRESETS.values() if _size(network(preset)) < _size(config))
    return found + [f"--preset {preset.preset}" for preset in smaller if _fits(preset, network(preset), machine)]


def _tuning_remedies(run: TuningRun, config: NetworkShape, machine: Machine) -> list[str]:
    """Return those changes that keep the model."""
    found = []
    if not (run.use_peft or run.fsdp) and _fits(replace(run, use_peft=True), config, machine):
        found.append("--use_peft")
    for length in (512, 256, 128, 64):
        is_shorter = length < run.sequence_length(config.max_position_embeddings)
        if is_shorter and _fits(replace(run, max_length=length), config, machine):
            return [*found, f"--max_length {length}"]
    return found


def _size(config: Network) -> int:
    return count_parameters(config).total


def _fits(run: Run, config: Network, machine: Machine, processes: int | None = None) -> bool:
    machine = machine._replace(processes=processes or machine.processes)
    return memory(run, config, machine, 1, 2).total <= USABLE_SHARE * machine.memory_bytes


def _low_copies(run: Run, config: NetworkShape) -> int:
    """Count the weights whose low-precision copies autocast keeps; of frozen ones, those that a backward pass needs."""
    matrices, adapter = count_parameters(config).matrices, adapter_parameters(run, config)
    if isinstance(run, TuningRun) and run.load_in_4bit:
        return adapter
    if adapter and run.gradient_checkpointing:
        matrices //= config.num_hidden_layers
    return matrices + adapter


def _activations(run: Run, config: NetworkShape, machine: Machine) -> int:
    """Return the bytes that a token keeps for the backward pass."""
    layer = _layer_activations(run, config, machine)
    ends = 3 * FLOAT * config.hidden_size  # the embeddings, and the last normalization's input and output
    if run.gradient_checkpointing:
        return config.num_hidden_layers * FLOAT * config.hidden_size + layer + ends
    return config.num_hidden_layers * layer + ends


def _layer_activations(run: Run, config: NetworkShape, machine: Machine) -> int:
    """Return the bytes that a token keeps in a layer.

    They hold both normalizations' inputs in float32, and what RMSNorm multiplies with its weights, unless in one
    kernel; the input of each product, with a copy by autocast for each of those that share one; queries, keys and
    values, of grouped heads one for each query, and queries and keys before a normalization; the activation's input
    and output, and those of its gate; and the adapters' narrow states.
    """
    width, heads, inner = config.hidden_size, _heads_width(config), config.intermediate_size
    low, is_gated = is_low_precision(run, machine), config.mlp == "gated"
    has_steps = config.norm == "rmsnorm" and config.norm_elementwise_affine and machine.kind != "cuda"
    inputs = 4 + is_gated if low else 2  # without autocast, products share them
    products = (LOW if low else FLOAT) * (inputs * width + 4 * heads + (4 if is_gated else 2) * inner)
    norms = FLOAT * (1 + has_steps) * (2 * width + 2 * heads * config.qk_norm)
    narrow = _adapter_activations(run, config, low)
    return norms + products + narrow + _attention_weights(run, config, machine)


def _adapter_activations(run: Run, config: NetworkShape, low: bool) -> int:
    """Return the bytes of a token's states between the two matrices of the adapters in a layer."""
    if not (isinstance(run, TuningRun) and run.use_peft):
        return 0
    return (LOW if low else FLOAT) * run.lora_r * len(adapted_layers(run, config)) // config.num_hidden_layers


def _attention_weights(run: Run, config: NetworkShape, machine: Machine) -> int:
    """Return the bytes of a token's attention weights in a layer, or of the mask that separates packed documents."""
    length, low = run.sequence_length(config.max_position_embeddings), is_low_precision(run, machine)
    if run.attn_implementation == "eager":
        return (FLOAT + LOW * low) * config.num_attention_heads * length
    reads_bounds = machine.kind == "cuda" and low and run.attn_implementation != "sdpa"  # such as auto's
    return 0 if isinstance(run, PreferenceRun) or reads_bounds else (LOW if low else FLOAT) * length


def _loss(config: NetworkShape, machine: Machine, low: bool, tokens: int) -> int:
    """Return the bytes of states and their gradients, the embeddings' copy and gradient, and one chunk of logits."""
    size = LOW if low else FLOAT
    states = tokens * config.hidden_size * (3 * FLOAT + LOW * low)
    embeddings = config.vocab_size * config.hidden_size * (FLOAT + LOW * low)
    logits = min(tokens, logit_rows(machine.kind, torch.bfloat16 if low else torch.float32))
    softmax = min(logits, softmax_rows(machine.kind))
    return states + embeddings + config.vocab_size * (size * logits + FLOAT * softmax)


def _heads_width(config: NetworkShape) -> int:
    return config.num_attention_heads * config.head_dim


def _powers_of_two(number: int) -> Iterator[int]:
    """Yield the powers of two that divide a number, in ascending order."""
    power = 1
    while number % power == 0:
        yield power
        power *= 2
