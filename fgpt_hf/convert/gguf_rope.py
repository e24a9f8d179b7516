"""Write rotary positions, and their scaling to longer contexts, for llama.cpp; needs the package `gguf`."""

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fgpt_hf.errors import UserError

# By type of scaling, the values of rope_parameters that llama.cpp reads.
_READ = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
_WITH_FACTORS = ("llama", "arcee")  # the classes for which llama.cpp reads a factor for each frequency


def add_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    """Add the base frequency, and linear scaling; Llama 3's is a tensor, `rope_factors`.

    Raises:
        UserError: llama.cpp does not know this scaling, or not for this class.
    """
    rope = config.rope_parameters
    kind = rope["rope_type"]
    names = {name for name, value in rope.items() if value is not None} - {"rope_theta", "rope_type"}
    if kind not in _READ or names - _READ[kind] or (kind == "llama3" and config.model_type not in _WITH_FACTORS):
        instead = f"export to {config.model_type} or onnx instead"
        raise UserError(f"llama.cpp's {config.model_type} cannot express rope_parameters={rope}; {instead}")
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(config: Any, head_dim: int) -> NDArray[np.float32] | None:
    """Return by how much Llama 3's scaling divides each frequency, (head_dim / 2); None for other scalings."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return np.asarray(plain / scaled.numpy(), dtype=np.float32)
