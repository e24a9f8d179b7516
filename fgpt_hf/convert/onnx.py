"""Write a stock class of transformers as an ONNX graph in the layout of Optimum and Transformers.js.

It needs the packages `onnx` and `onnxscript`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from transformers import PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

GRAPH = "onnx/model.onnx"
INT8_GRAPH = "onnx/model_quantized.onnx"  # as Transformers.js calls it
SMALL_WEIGHTS = 4096  # numbers: such a tensor stays in float32
MAX_GRAPH_BYTES = 1_500_000_000  # Protobuf ends at 2 GB: the weights of a larger graph are in a file of their own


def write_graph(network: PreTrainedModel, folder: Path, int8: bool = False) -> None:
    """Write `onnx/model.onnx`, or with int8 weights `onnx/model_quantized.onnx`, and its two configs in JSON.

    Inputs: `input_ids` (B, T), `attention_mask` (B, S), `position_ids` (B, T), and for each layer N the cache of the
    S - T tokens before, which may be empty: `past_key_values.N.key` and `.value` (B, heads of keys and values, S - T,
    width of a head).
    Outputs: `logits` (B, T, V), and `present.N.key` and `.value` with S tokens.
    """
    program = _traced(network)
    _rename(program, network.config)
    if int8:
        store_as_int8(program.graph)
    graph = folder / (INT8_GRAPH if int8 else GRAPH)
    is_large = sum(value.const_value.nbytes for value in program.graph.initializers.values()) > MAX_GRAPH_BYTES
    graph.parent.mkdir()
    onnx_ir.save(program, graph, external_data=f"{graph.name}_data" if is_large else None)
    config = network.config
    config.architectures = [type(network).__name__]
    config.update({"transformers.js_config": {"dtype": "q8" if int8 else "fp32", "use_external_data_format": is_large}})
    config.save_pretrained(folder)
    network.generation_config.save_pretrained(folder)


def _traced(network: PreTrainedModel) -> Any:
    """Return the graph of a step with a cache, for any batch size and lengths."""
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with torch.no_grad():
        inputs = {
            "input_ids": ids[:, 2:],
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(2, 5).repeat(2, 1),
            "past_key_values": network(ids[:, :2], use_cache=True).past_key_values,
        }
        return OnnxExporter().export(network, inputs, OnnxConfig(dynamic=True)).program


def _rename(program: Any, config: Any) -> None:
    """Give the inputs and outputs, which stay in their order, the names that other programs look for."""
    batch, new, known, whole = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    inputs: dict[str, list[str | int]]
    inputs = {"input_ids": [batch, new], "attention_mask": [batch, whole], "position_ids": [batch, new]}
    inputs |= {f"past_key_values.{part}": [batch, heads, known, width] for part in parts}
    outputs: dict[str, list[str | int]] = {"logits": [batch, new, config.vocab_size]}
    outputs |= {f"present.{part}": [batch, heads, whole, width] for part in parts}
    for values, shapes in ((program.graph.inputs, inputs), (program.graph.outputs, outputs)):
        for value, (name, shape) in zip(values, shapes.items(), strict=True):
            value.name, value.shape = name, onnx_ir.Shape(shape)


def store_as_int8(graph: Any) -> None:
    """Store each large weight of a graph as int8 with scales, and multiply it when the graph is loaded.

    ONNX Runtime does that once, and computes in float32: only the rounding of the weights changes a result, and a text
    is that of a network with the rounded weights.
    """
    nodes = []
    for name, value in list(graph.initializers.items()):
        weights = value.const_value.numpy()
        if weights.dtype != np.float32 or weights.ndim != 2 or weights.size < SMALL_WEIGHTS:
            continue
        steps, scales = int8_steps(weights)
        made = [
            onnx_ir.Value(name=f"{name}.{part}", const_value=onnx_ir.tensor(array, name=f"{name}.{part}"))
            for part, array in (("int8", steps), ("scales", scales))
        ]
        for part in made:
            graph.register_initializer(part)
        as_float = onnx_ir.node("Cast", [made[0]], attributes={"to": onnx_ir.DataType.FLOAT})
        product = onnx_ir.node("Mul", [as_float.outputs[0], made[1]])
        onnx_ir.convenience.replace_all_uses_with(value, product.outputs[0])
        del graph.initializers[name]
        nodes += [as_float, product]
    graph.insert_before(graph[0], nodes)


def int8_steps(weights: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return a matrix in steps from -127 to 127, and the size of a step by row or by column, whichever is closer.

    Example:
        >>> int8_steps(np.array([[1.27, 0.01], [0.0, 127.0]], np.float32))[0].tolist()
        [[127, 1], [0, 127]]
    """
    choices = []
    for axis in (0, 1):
        largest = np.abs(weights).max(axis=axis, keepdims=True)
        scales = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
        steps = np.round(weights / scales).astype(np.int8)
        choices.append((float(np.square(weights - steps * scales).sum()), steps, scales))
    _, steps, scales = min(choices, key=lambda choice: choice[0])
    return steps, scales
