"""Estimate memory, FLOPs and the largest micro-batch of a run on a machine, from its options alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import PreferenceRun, Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.losses.linear_cross_entropy import logit_rows, softmax_rows
from fgpt_hf.model.lora import adapted_layers, adapter_parameters
from fgpt_hf.model.quantization import BITS_PER_WEIGHT
from fgpt_hf.model.shapes import NetworkShape, shape_of
from fgpt_hf.runtime.hardware import Machine
from fgpt_hf.runtime.network import Network, ParameterCounts, count_parameters, flops_per_token, network_config

USABLE_SHARE = 0.9  # of the memory; allocators lose some between their blocks
FLOAT, LOW = 4, 2  # bytes of a float32; of a bfloat16 or float16


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


@dataclass(frozen=True)
class Workload:
    """A run of a network on a machine, and what it takes of memory and arithmetic there.

    Attributes:
        run: its options.
        config: the network's configuration, or its shape.
        machine: the devices.

    Example:
        >>> from fgpt_hf.runtime.hardware import known_machine
        >>> run = PRESETS["fgpt-712m"]
        >>> workload = Workload(run, network_config(run), known_machine("h100"))
        >>> workload.largest_micro_batch(), workload.memory(rows=32, micro_batches=16).weights
        (32, 4138086528)
    """

    run: Run
    config: Network
    machine: Machine

    @cached_property
    def shape(self) -> NetworkShape:
        """The network's shape."""
        return shape_of(self.config)

    @cached_property
    def counts(self) -> ParameterCounts:
        """The network's parameters."""
        return count_parameters(self.shape)

    @cached_property
    def adapter(self) -> int:
        """The parameters of the run's adapter, which alone are trained; 0 without one."""
        return adapter_parameters(self.run, self.shape)

    @property
    def trained(self) -> ParameterCounts:
        """The parameters that the optimizer updates: the network's, or an adapter's instead."""
        return ParameterCounts(vectors=self.adapter) if self.adapter else self.counts

    @property
    def is_low_precision(self) -> bool:
        """Whether products are bfloat16 or float16: as the run asks, or else as the hardware supports."""
        return self.run.fp16 or (self.machine.has_bf16 if self.run.bf16 is None else self.run.bf16)

    @property
    def length(self) -> int:
        """The tokens of a sequence of the maximum length."""
        return self.run.sequence_length(self.shape.max_position_embeddings)

    @property
    def flops_per_token(self) -> int:
        """The FLOPs of a token's forward and backward pass."""
        return flops_per_token(self.run, self.shape)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step on all devices, if every sequence has the maximum length."""
        return self.run.rows_per_step(self.machine.processes) * self.run.sequences_per_row * self.length

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return model FLOPs utilization: the fraction of all devices' bfloat16 peak, or None if that is unknown."""
        if self.machine.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_second / (self.machine.peak_flops * self.machine.processes)

    def memory(self, rows: int, micro_batches: int) -> Memory:
        """Estimate the memory of each device with `micro_batches` per step, each of `rows` rows of the full length."""
        run, counts, processes = self.run, self.counts, self.machine.processes
        tokens = rows * run.sequences_per_row * self.length
        activations = self._activations() * tokens
        # The small products of adapters fragment a C library's heap by about as much (docs/benchmarks.md).
        holes = activations if self.adapter and self.machine.kind == "cpu" else 0
        muon_matrices = self.trained.matrices if run.optim == "muon" else 0  # Muon keeps one value per parameter
        copies = 2 if processes > 1 and not run.fsdp else 1  # DDP collects gradients in buckets of its own
        sharing = processes if run.fsdp else 1
        whole = whole_gradients = 0
        if sharing > 1:  # embeddings stay gathered for a whole pass, a layer while it and the one before it compute
            layers = self.shape.num_hidden_layers
            whole = counts.total - counts.matrices - counts.vectors + 2 * counts.matrices // layers
            whole_gradients = counts.total if micro_batches > 1 else whole  # FSDP shares them after the last one
        return Memory(
            weights=self._weights(sharing) + FLOAT * whole + LOW * self.is_low_precision * self._low_copies(),
            gradients=FLOAT * (copies * self.trained.total // sharing + whole_gradients),
            optimizer=FLOAT * (2 * self.trained.total - muon_matrices) // sharing,
            activations=activations,
            loss=self._loss(tokens),
            # The gradients within one layer, and the dense gradient of the token look-up next to the head's; with an
            # adapter, a copy of the embeddings with the rows of the role tokens.
            working=self._layer_activations() * tokens + FLOAT * counts.token_embeddings + holes,
            gradients_stay=micro_batches > 1,
        )

    def largest_micro_batch(self) -> int | None:
        """Return the largest power of two of rows that fits the memory and divides a device's rows per step, or None.

        Raises:
            UserError: as `rows_on_device`.
        """
        best, all_rows = None, self.rows_on_device()
        for rows in _powers_of_two(all_rows):
            if self._has_room_for(self.memory(rows, all_rows // rows)):
                best = rows
        return best

    def rows_on_device(self) -> int:
        """Return the rows of a step on each device.

        Raises:
            UserError: the rows of a step do not divide among the processes.
        """
        rows, processes = self.run.rows_per_step(self.machine.processes), self.machine.processes
        if rows % processes:
            raise UserError(
                f"per_device_train_batch_size=auto: {rows} rows per step do not divide among {processes} processes; "
                "give per_device_train_batch_size and gradient_accumulation_steps as numbers"
            )
        return rows // processes

    def remedies(self) -> list[str]:
        """Return the changes of flags, each of which alone lets at least one row fit such devices."""
        found = []
        for processes in () if self.adapter else (2, 4, 8, 16, 32, 64):  # PEFT's layers cannot be sharded
            more = replace(self.changed(fsdp=True), machine=self.machine._replace(processes=processes))
            if processes > self.machine.processes and more.fits:
                found.append(f"--fsdp on {processes} such devices")
                break
        if not self.run.gradient_checkpointing and self.changed(gradient_checkpointing=True).fits:
            found.append("--gradient_checkpointing")
        if isinstance(self.run, TuningRun):
            return found + self._tuning_remedies(self.run)
        smaller = (Workload(preset, network_config(preset), self.machine) for preset in PRESETS.values())
        return found + [
            f"--preset {each.run.preset}" for each in smaller if each.counts.total < self.counts.total and each.fits
        ]

    def _tuning_remedies(self, run: TuningRun) -> list[str]:
        """Return those changes that keep the model."""
        found = []
        if not (run.use_peft or run.fsdp) and self.changed(use_peft=True).fits:
            found.append("--use_peft")
        for length in (512, 256, 128, 64):
            if length < self.length and self.changed(max_length=length).fits:
                return [*found, f"--max_length {length}"]
        return found

    def changed(self, **options: Any) -> "Workload":
        """Return the workload with other options of its run."""
        return replace(self, run=replace(self.run, **options))

    @property
    def fits(self) -> bool:
        """Whether micro-batches of one row fit, with accumulation."""
        return self._has_room_for(self.memory(rows=1, micro_batches=2))

    def _has_room_for(self, need: Memory) -> bool:
        return need.total <= USABLE_SHARE * self.machine.memory_bytes

    @property
    def _size(self) -> int:
        """The bytes of a value that autocast computes."""
        return LOW if self.is_low_precision else FLOAT

    @property
    def _heads_width(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_dim

    def _weights(self, sharing: int) -> int:
        """Return the bytes of the weights as they are stored on a device, of `sharing` that share them."""
        if isinstance(self.run, TuningRun) and self.run.load_in_4bit:
            quantized = sum(inputs * outputs for inputs, outputs in self.shape.linear_layers.values())
            return FLOAT * (self.counts.total - quantized + self.adapter) + int(quantized * BITS_PER_WEIGHT / 8)
        return FLOAT * ((self.counts.total + self.adapter) // sharing)

    def _low_copies(self) -> int:
        """Count the weights of which autocast keeps low-precision copies; frozen ones only for a backward pass."""
        if isinstance(self.run, TuningRun) and self.run.load_in_4bit:
            return self.adapter
        of_one_layer = self.adapter and self.run.gradient_checkpointing
        return self.counts.matrices // (self.shape.num_hidden_layers if of_one_layer else 1) + self.adapter

    def _activations(self) -> int:
        """Return the bytes that a token keeps for the backward pass."""
        layers, width = self.shape.num_hidden_layers, FLOAT * self.shape.hidden_size
        ends = 3 * width  # the embeddings, and the last normalization's input and output
        if self.run.gradient_checkpointing:
            return layers * width + self._layer_activations() + ends
        return layers * self._layer_activations() + ends

    def _layer_activations(self) -> int:
        """Return the bytes that a token keeps in a layer.

        They hold both normalizations' inputs in float32, and what RMSNorm multiplies with its weights, unless in one
        kernel; the input of each product, with a copy by autocast for each of those that share one; queries, keys and
        values, of grouped heads one for each query, and queries and keys before a normalization; the activation's
        input and output, and those of its gate; and the adapters' narrow states.
        """
        shape, heads, is_gated = self.shape, self._heads_width, self.shape.mlp == "gated"
        has_steps = shape.norm == "rmsnorm" and shape.norm_elementwise_affine and self.machine.kind != "cuda"
        norms = FLOAT * (1 + has_steps) * (2 * shape.hidden_size + 2 * heads * shape.qk_norm)
        inputs = 4 + is_gated if self.is_low_precision else 2  # without autocast, products share them
        inner = (4 if is_gated else 2) * shape.intermediate_size
        products = self._size * (inputs * shape.hidden_size + 4 * heads + inner)
        return norms + products + self._adapter_activations() + self._attention_weights()

    def _adapter_activations(self) -> int:
        """Return the bytes of a token's states between the two matrices of the adapters in a layer."""
        if not (isinstance(self.run, TuningRun) and self.run.use_peft):
            return 0
        layers = len(adapted_layers(self.run, self.shape))
        return self._size * self.run.lora_r * layers // self.shape.num_hidden_layers

    def _attention_weights(self) -> int:
        """Return the bytes of a token's attention weights in a layer, or of the mask that keeps documents apart."""
        low, attention = self.is_low_precision, self.run.attn_implementation
        if attention == "eager":
            return (FLOAT + LOW * low) * self.shape.num_attention_heads * self.length
        reads_bounds = self.machine.kind == "cuda" and low and attention != "sdpa"  # such as auto's
        return 0 if isinstance(self.run, PreferenceRun) or reads_bounds else self._size * self.length

    def _loss(self, tokens: int) -> int:
        """Return the bytes of states and their gradients, the embeddings' copy and gradient, and a chunk of logits."""
        low, kind = self.is_low_precision, self.machine.kind
        width, vocabulary = self.shape.hidden_size, self.shape.vocab_size
        states = tokens * width * (3 * FLOAT + LOW * low)
        embeddings = vocabulary * width * (FLOAT + LOW * low)
        logits = min(tokens, logit_rows(kind, torch.bfloat16 if low else torch.float32))
        softmax = min(logits, softmax_rows(kind))
        return states + embeddings + vocabulary * (self._size * logits + FLOAT * softmax)


def _powers_of_two(number: int) -> Iterator[int]:
    """Yield the powers of two that divide a number, in ascending order."""
    power = 1
    while number % power == 0:
        yield power
        power *= 2
