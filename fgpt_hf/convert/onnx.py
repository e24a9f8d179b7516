"""Write a stock class of transformers as an ONNX graph in the layout of Optimum and Transformers.js.

It needs the packages `onnx` and `onnxscript`.
"""

from pathlib import Path
from typing import Any

import onnx_ir
import torch
from transformers import PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

GRAPH, EXTERNAL_WEIGHTS = "onnx/model.onnx", "model.onnx_data"  # the second beside the first
MAX_GRAPH_BYTES = 1_500_000_000  # Protobuf ends at 2 GB: the weights of a larger graph are in a file of their own


def write_graph(network: PreTrainedModel, folder: Path) -> None:
    """Write `onnx/model.onnx` with its config.json and generation_config.json.

    Inputs: `input_ids` (B, T), `attention_mask` (B, S), `position_ids` (B, T), and for each layer N the cache of the
    S - T tokens before, which may be empty: `past_key_values.N.key` and `.value` (B, heads of keys and values, S - T,
    width of a head).
    Outputs: `logits` (B, T, V), and `present.N.key` and `.value` with S tokens.
    """
    program = _traced(network)
    _rename(program, network.config)
    is_large = sum(tensor.nbytes for tensor in network.state_dict().values()) > MAX_GRAPH_BYTES
    (folder / GRAPH).parent.mkdir()
    onnx_ir.save(program, folder / GRAPH, external_data=EXTERNAL_WEIGHTS if is_large else None)
    config = network.config
    config.architectures = [type(network).__name__]
    config.update({"transformers.js_config": {"dtype": "fp32", "use_external_data_format": is_large}})
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
