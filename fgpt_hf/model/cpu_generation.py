"""Fast replies on a CPU: layers that read their weights at the memory's speed, and a cache that grows in place.

Writing a token takes as long as reading all weights once, so small weights that are read well make replies fast. The
layers here call the products that `torch.compile` uses for linear layers on a CPU, without a compiler. Everything else
is transformers' `generate`, whose text does not change with these layers.

`space/` and `fgpt_hf/model/` hold the same file, because a Space imports nothing of `fgpt_hf`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D

BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight, once it is loaded
TIMED_PARAMETERS = 50_000_000  # smaller models are fast in float32, and always write the same there
INT8_PARAMETERS = 300_000_000  # smaller models need no int8
MIN_GAIN = 1.15  # what a smaller format must gain over float32
MAX_LOSS_RISE = 0.01  # of int8, as a fraction
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers that read the same states
LINEAR = (nn.Linear, Conv1D)  # themselves, not what is made of them; Conv1D is GPT-2's, with its weight transposed
SLOTS = 256  # by which a cache grows, in tokens
TEXT = (  # whose loss int8 may raise by `MAX_LOSS_RISE`
    "A library is a collection of books, and possibly other materials and media, that is accessible for use by its "
    "members. Libraries provide physical or digital materials. A library's collection normally includes printed books "
    "which can be borrowed, and usually also includes a reference section of publications which may only be utilized "
    "inside the premises. In mathematics, a function from a set to a set assigns to each element of the first set "
    "exactly one element of the second. For example, the position of a planet is a function of time. She asked him "
    "what he had seen, and he said that the river was higher than last year, that two of the boats were gone, and "
    "that nobody in the village had been able to sleep."
)


class OneDnnLinear(nn.Module):
    """A linear layer in float32 or bfloat16 by oneDNN, which reads the weights with all threads.

    torch's own product of one row reads float32 with one thread, and bfloat16 at half the speed of packed weights.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape
        # Plain attributes: `Module.to` would unpack them. float32 stays as it is, and tied to the embeddings.
        self._weight = _one_dnn._reorder_linear_weight(weight, 1) if weight.dtype == torch.bfloat16 else weight
        self._bias = bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(…, inputs)` to `(…, outputs)`."""
        product: torch.Tensor = _one_dnn._linear_pointwise(states, self._weight, self._bias, "none", [], "")
        return product


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale for each output, and inputs in eight bits, one scale for each token.

    A token's result depends on no other token, so a text is the same with a cache and without.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self._bias = None if bias is None else bias.float()
        self._scales = torch.empty(self.outputs)
        quantized = torch.empty(weight.shape, dtype=torch.int8)
        for start in range(0, self.outputs, 4096):  # by parts: a head in float32 is large
            rows = slice(start, start + 4096)
            part = weight[rows].float()
            self._scales[rows] = part.abs().amax(1).clamp(min=1e-8) / 127
            quantized[rows] = (part / self._scales[rows, None]).round().to(torch.int8)
        self._zeros = torch.zeros(self.outputs, dtype=torch.int32)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, [1, self.inputs])
        # Without VNNI, products of two full bytes overflow the 16 bits in which pairs of them are added.
        self._levels = 127 if _has_vnni() else 63
        self._middle = torch.tensor(self._levels + 1.5)  # half more, because the cast to bytes rounds down

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(…, inputs)` to `(…, outputs)`, in float32."""
        flat = states.reshape(-1, self.inputs).float()
        scale = torch.linalg.vector_norm(flat, float("inf"), dim=-1, keepdim=True).div_(self._levels).add_(1e-12)
        rounded = torch.addcdiv(self._middle, flat, scale).to(torch.uint8)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            self._levels + 1,
            self._weight,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        product = product * scale if self._bias is None else torch.addcmul(self._bias, product, scale)
        return product.view(*states.shape[:-1], self.outputs)


class JointLinear:
    """One product for layers that read the same states, of which each returns its own part.

    The states are known again by their identity, so layers that read others get what is theirs too.
    """

    def __init__(self, layer: nn.Module, sizes: Sequence[int]) -> None:
        self._layer, self._sizes = layer, list(sizes)
        self._states: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()

    def part(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Map `(…, inputs)` to the outputs of one layer; the last one ends the use of the product."""
        if states is not self._states:
            self._states, self._parts = states, self._layer(states).split(self._sizes, dim=-1)
        part = self._parts[index]
        if index == len(self._sizes) - 1:
            self._states, self._parts = None, ()
        return part


class JointPart(nn.Module):
    """A layer whose product is a part of a larger one."""

    def __init__(self, joint: JointLinear, index: int) -> None:
        super().__init__()
        self.joint, self.index = joint, index

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(…, inputs)` to `(…, outputs)`."""
        return self.joint.part(self.index, states)


class Float32Output(nn.Module):
    """An embedding whose table is stored in a smaller format than its output."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the ids in float32."""
        embeddings: torch.Tensor = self.embedding(ids)
        return embeddings.float()


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return torch's own layer, for machines without oneDNN."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


_one_dnn: Any = torch.ops.mkldnn
_linear: Callable[..., nn.Module] = OneDnnLinear if torch.backends.mkldnn.is_available() else plain_linear
_LAYERS: Mapping[str, tuple[Callable[..., nn.Module], torch.dtype]] = {  # and the type that they are made from
    "float32": (_linear, torch.float32),
    "bfloat16": (_linear, torch.bfloat16),
    "int8": (Int8Linear, torch.bfloat16),
}


def available_formats() -> list[str]:
    """Return the formats that this machine has, the largest first."""
    return [name for name in BYTES if name != "int8" or "onednn" in torch.backends.quantized.supported_engines]


def loaded_dtype(number_format: str) -> torch.dtype:
    """Return the type in which a model is loaded that will have this format.

    Example:
        >>> loaded_dtype("int8")
        torch.bfloat16
    """
    return _LAYERS[number_format][1]


def prepare(model: PreTrainedModel, number_format: str, text: Sequence[int] = ()) -> bool:
    """Give a model on the CPU the layers of a format, in place; return False if its loss would rise too much.

    Its weights are replaced one after the other, so that no more than one of them is there twice. Afterwards the model
    can write, and can be neither trained nor saved. A model whose own code reads the weights of its layers, such as a
    Mamba, keeps torch's layers, and returns False for int8.

    Args:
        model: a model loaded in `loaded_dtype(number_format)`, in evaluation mode.
        number_format: a key of `BYTES`.
        text: ids of a text that the model knows how to write, such as `TEXT`. In int8 its loss may rise by 1 %. A model
            that returned False has lost its weights: load it again in another format.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> prepare(model, "float32")
        True
        >>> type(model.lm_head).__name__
        'OneDnnLinear'
    """
    make, _ = _LAYERS[number_format]
    if _reads_weights(model):
        return number_format != "int8"
    if number_format != "int8":
        _replace_linears(model, make)
        return True
    before = text_loss(model, text) if text else 0.0
    _replace_linears(model, make)
    _compute_in_float32(model)
    return not text or text_loss(model, text) <= before * (1 + MAX_LOSS_RISE)


@torch.inference_mode()
def _reads_weights(model: PreTrainedModel) -> bool:
    """Return whether the model's own code reads the weights of its linear layers, and does not only call them."""
    linears = [
        (parent, *child) for parent in model.modules() for child in parent.named_children() if type(child[1]) in LINEAR
    ]
    try:
        for parent, name, layer in linears:
            size: Any = layer.nf if isinstance(layer, Conv1D) else layer.out_features
            setattr(parent, name, JointPart(JointLinear(layer, [size]), 0))  # which has no weight
        model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    except Exception as error:  # any other one would meet the reply too, which reports it
        return isinstance(error, AttributeError)
    finally:
        for parent, name, layer in linears:
            setattr(parent, name, layer)
    return False


def _replace_linears(model: nn.Module, make: Callable[..., nn.Module]) -> None:
    # Without the linear layers themselves, so that nothing holds the weights of one that was replaced.
    for parent in [module for module in model.modules() if type(module) not in LINEAR]:
        linears = {name: child for name, child in parent.named_children() if type(child) in LINEAR}
        for names in ONE_INPUT:
            if _are_alike(together := [linears.get(name) for name in names]):
                parts = _joined([linears.pop(name) for name in names], make)
                for name, part in zip(names, parts, strict=True):
                    setattr(parent, name, part)
            del together  # which would keep their weights
        for name in list(linears):
            setattr(parent, name, make(*_weights(linears.pop(name))))


def _are_alike(layers: Sequence[nn.Module | None]) -> bool:
    """Return whether one product can take the place of these layers."""
    shapes = {(layer.in_features, layer.bias is None) for layer in layers if type(layer) is nn.Linear}
    return len(shapes) == 1 and all(type(layer) is nn.Linear for layer in layers)


def _joined(layers: Sequence[nn.Module], make: Callable[..., nn.Module]) -> list[JointPart]:
    weights, biases = zip(*map(_weights, layers), strict=True)
    whole = make(torch.cat(weights), None if biases[0] is None else torch.cat(biases))
    joint = JointLinear(whole, [len(weight) for weight in weights])
    return [JointPart(joint, index) for index in range(len(layers))]


def _weights(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = layer.get_parameter("weight").detach()
    bias: Any = layer.bias
    return weight.t().contiguous() if type(layer) is Conv1D else weight, None if bias is None else bias.detach()


def _compute_in_float32(model: PreTrainedModel) -> None:
    """Turn what is no linear layer to float32, but not the table of the tokens, which would be a large part of it."""
    table = model.get_input_embeddings()
    for parameter in model.parameters():
        # The table is copied, because it would keep the whole file of weights mapped into memory.
        parameter.data = parameter.data.clone() if parameter is table.weight else parameter.data.float()
    model.set_input_embeddings(Float32Output(table))


@torch.inference_mode()
def text_loss(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Return the loss of a text in nats per token."""
    batch = torch.tensor([list(ids)])
    logits = model(batch, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, batch[0, 1:]).item()


def formats_by_speed(parameters: int, seconds: Mapping[str, float]) -> list[str]:
    """Return the formats for a model of this size, the best first; float32 goes last only if others gain enough.

    Args:
        parameters: number of the model's parameters.
        seconds: what `time_formats` measured, or nothing for a small model.

    Example:
        >>> formats_by_speed(712_000_000, {"float32": 0.08, "bfloat16": 0.05, "int8": 0.03})
        ['int8', 'bfloat16', 'float32']
        >>> formats_by_speed(124_000_000, {"float32": 0.08, "bfloat16": 0.05, "int8": 0.03})
        ['bfloat16', 'float32']
    """
    if parameters < TIMED_PARAMETERS:
        return ["float32"]
    plain = seconds["float32"]
    faster = [
        name
        for name in sorted(seconds, key=lambda name: seconds[name])
        if seconds[name] * MIN_GAIN <= plain and (name != "int8" or parameters >= INT8_PARAMETERS)
    ]
    return [*faster, "float32"]


def time_formats(layers: int = 16, seconds: float = 0.5) -> dict[str, float]:
    """Return the seconds for one token's products with the same layers in each format that this machine has.

    Args:
        layers: number of the layers, 2 million weights each, which no processor's cache should hold.
        seconds: time for all formats together; with the making of the layers it takes about twice as long.
    """
    formats, times = available_formats(), {}
    for name in formats:
        make, dtype = _LAYERS[name]
        weight = torch.full((1024, 2048), 0.01, dtype=dtype)
        made = [make(weight.clone(), None) for _ in range(layers)]
        times[name] = min(_passes(made, dtype, seconds / len(formats)))
    return times


@torch.inference_mode()
def _passes(layers: Sequence[nn.Module], dtype: torch.dtype, seconds: float) -> Iterator[float]:
    """Yield the time of each pass of one token through all layers, until the seconds are over."""
    token = torch.ones(1, 2048, dtype=torch.float32 if isinstance(layers[0], Int8Linear) else dtype)
    end = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        for layer in layers:
            layer(token)
        now = time.perf_counter()
        yield now - began
        if now > end:
            return


def _has_vnni() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni") or found.get("architecture") == "aarch64")


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory that is taken for many tokens at once; a new token copies only itself."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin without tokens."""
        super().lazy_initialization(key_states, value_states)
        self._slots = [self._empty(states, 0) for states in (key_states, value_states)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new states `(B, H, T, D)`, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        held: Any = (self.keys, self.values)
        # Searches with beams, and batches that shrink, put other tensors in the place of views of the slots.
        if end > self._slots[0].shape[-2] or held[0].data_ptr() != self._slots[0].data_ptr():
            self._slots = [self._empty(states, end) for states in (key_states, value_states)]
            if start:
                for slots, old in zip(self._slots, held, strict=True):
                    slots[:, :, :start] = old
        for slots, states in zip(self._slots, (key_states, value_states), strict=True):
            slots[:, :, start:end] = states
        keys, values = (slots[:, :, :end] for slots in self._slots)
        self.keys, self.values = keys, values
        return keys, values

    @staticmethod
    def _empty(like: torch.Tensor, tokens: int) -> torch.Tensor:
        slots = -(-tokens // SLOTS) * SLOTS
        return like.new_empty(*like.shape[:2], slots, like.shape[-1])


def cache_options(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of `generate` that give it an empty cache with layers that grow in place.

    It is the cache that transformers makes, and layers of other kinds, such as those of a sliding window, stay as they
    are. A model that brings a cache of its own gets no argument.
    """
    wants_another = getattr(model.generation_config, "cache_implementation", None) is not None
    takes_it = "past_key_values" in signature(model.forward).parameters  # Mamba takes a cache by another name
    if wants_another or not takes_it or not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return {}
    cache: Any = DynamicCache(config=model.config)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}
