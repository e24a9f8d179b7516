"""Write a stock class of transformers as a GGUF file for llama.cpp; needs the package `gguf`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.convert.gguf_rope import add_rope, rope_factors
from fgpt_hf.convert.layouts import LINEAR_MODULES
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_file
from fgpt_hf.tokenizer.document_encoder import begins_texts, has_byte_bpe

logger = logging.getLogger(__name__)

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three ways to compute the same function
PRE_TOKENIZER = "gpt-2"  # llama.cpp's name for GPT-2's pattern that splits text into words
EMBEDDINGS = ("token_embd", "output")
ALWAYS_FLOAT32 = ("position_embd",)  # as llama.cpp's own converter keeps it, with all vectors


class Architecture(NamedTuple):
    """How llama.cpp knows a stock class.

    Attributes:
        arch: its name there.
        activations: names of the only function that it computes in the MLP.
        pairs_neighbors: whether its rotary positions turn neighboring values of a head rather than its halves.
        has_biases: whether its projections may have biases.
    """

    arch: gguf.MODEL_ARCH
    activations: tuple[str, ...]
    pairs_neighbors: bool = False
    has_biases: bool = True


ARCHITECTURES = {
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2, TANH_GELU),
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, ("silu", "swish"), pairs_neighbors=True),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, ("silu", "swish"), has_biases=False),
    "arcee": Architecture(gguf.MODEL_ARCH.ARCEE, ("relu2",), pairs_neighbors=True, has_biases=False),
}


class WeightType(NamedTuple):
    """A type of the numbers in a file: of its matrices, of embeddings and head among them, and of the file's name."""

    matrices: GGMLQuantizationType
    embeddings: GGMLQuantizationType
    file_type: LlamaFileType


_Q = GGMLQuantizationType
WEIGHT_TYPES: Mapping[str, WeightType] = {
    "F32": WeightType(_Q.F32, _Q.F32, LlamaFileType.ALL_F32),
    "F16": WeightType(_Q.F16, _Q.F16, LlamaFileType.MOSTLY_F16),
    "BF16": WeightType(_Q.BF16, _Q.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": WeightType(_Q.Q8_0, _Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    # Four bits cost too much in the head, for which llama.cpp's own quantizer takes a wider type too.
    "Q4_0": WeightType(_Q.Q4_0, _Q.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}
WITHOUT_BLOCKS = "F16"  # what becomes of a network whose rows cannot be divided into a type's blocks


def write_gguf_file(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, outtype: str) -> str:
    """Write the weights, the shape, the tokenizer and the chat template into one file; return the type of the weights.

    Args:
        outtype: one of `WEIGHT_TYPES`. Vectors and position embeddings are always float32. A network with a width that
            is no multiple of 32, the block of `Q8_0` and `Q4_0`, is written as `F16`, which is logged.

    Raises:
        UserError: the name does not end in .gguf; the type is unknown; llama.cpp does not know the class, or its
            version of the class lacks the activation function, the biases or the scaling of rotary positions.
    """
    if file.suffix != ".gguf":
        raise UserError(f"{file}: the name of a GGUF file must end in .gguf")
    architecture = _architecture(model.config)
    outtype = possible_type(model, outtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture.arch])
        writer.add_name(file.stem)
        writer.add_file_type(WEIGHT_TYPES[outtype].file_type)
        _add_shape(writer, model.config)
        _add_tokenizer(writer, tokenizer, model)
        _add_weights(writer, model, architecture, WEIGHT_TYPES[outtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return outtype


def possible_type(model: PreTrainedModel, outtype: str) -> str:
    """Return the type in which a network can be written: the one asked for, or F16 if its widths do not allow it.

    Raises:
        UserError: the type is unknown.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> possible_type(GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=3)), "Q8_0")
        'F16'
    """
    if (known := {name.lower(): name for name in WEIGHT_TYPES}.get(outtype.lower())) is None:
        raise UserError(f"outtype={outtype!r} is unknown: choose from {', '.join(WEIGHT_TYPES)}")
    block, _ = gguf.GGML_QUANT_SIZES[WEIGHT_TYPES[known].matrices]
    config = model.config
    shape = {"hidden_size": config.hidden_size, "intermediate_size": _intermediate_size(config)}
    shape["num_attention_heads * head_dim"] = config.num_attention_heads * _head_dim(config)
    if odd := [f"{name}={width:,}" for name, width in shape.items() if width % block]:
        logger.warning("written as %s: %s needs multiples of %d, unlike %s", WITHOUT_BLOCKS, known, block, odd[0])
        return WITHOUT_BLOCKS
    return known


def _architecture(config: PreTrainedConfig) -> Architecture:
    """Return how llama.cpp knows a class; raise UserError if it does not, or lacks one of its fields' values."""
    name, architecture = config.model_type, ARCHITECTURES.get(config.model_type)
    instead = f"export to {name} or onnx instead"
    if architecture is None:
        raise UserError(f"llama.cpp does not know {name}, only {', '.join(ARCHITECTURES)}; {instead}")
    activation = getattr(config, "activation_function", None) or config.hidden_act
    if activation not in architecture.activations:
        only = architecture.activations[0]
        raise UserError(f"llama.cpp's {name} cannot express hidden_act={activation!r}, only {only!r}; {instead}")
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False) and not architecture.has_biases:
            raise UserError(f"llama.cpp's {name} cannot express {bias}=True; {instead}")
    return architecture


def _intermediate_size(config: Any) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.n_embd)
    return int(config.intermediate_size)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_intermediate_size(config))
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_rope(writer, config, _head_dim(config))


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, model: PreTrainedModel) -> None:
    """Add a token for each row of the embeddings; those that the tokenizer does not know are marked as unused."""
    if not has_byte_bpe(tokenizer):
        raise UserError(
            "GGUF files are written with tokenizers that divide text as GPT-2's does, and this one does not: write the "
            "model's folder with llama.cpp's own convert_hf_to_gguf.py"
        )
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    control = set(tokenizer.all_special_ids)
    size = model.config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([vocabulary.get(index, f"[UNUSED{index}]") for index in range(size)])
    writer.add_token_types([_token_type(index, vocabulary, control) for index in range(size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    named = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for name, add in named.items():
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:  # a converted model need not have each
            add(index)
    writer.add_add_bos_token(begins_texts(tokenizer))
    ends = model.generation_config.eos_token_id if model.generation_config else None
    turn_ends = {*(ends if isinstance(ends, list) else [ends])} - {tokenizer.eos_token_id, None}
    if turn_ends:
        writer.add_eot_token_id(min(turn_ends))  # there is room for one
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _token_type(index: int, vocabulary: dict[int, str], control: set[int]) -> gguf.TokenType:
    if index not in vocabulary:
        return gguf.TokenType.UNUSED
    return gguf.TokenType.CONTROL if index in control else gguf.TokenType.NORMAL


def _add_weights(
    writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: Architecture, weight_type: WeightType
) -> None:
    names = gguf.get_tensor_name_map(architecture.arch, model.config.num_hidden_layers)
    if (factors := rope_factors(model.config, _head_dim(model.config))) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # llama.cpp uses the embeddings if there is no head
        module, _, kind = name.rpartition(".")
        gguf_name = names.get_name(module.removeprefix("transformer."))
        if gguf_name is None:
            raise UserError(f"llama.cpp's {type(model).__name__} has no weight {name}")
        values = _as_llama_cpp(model, architecture, name, tensor)
        number_type = _number_type(gguf_name, values, weight_type)
        data = gguf.quants.quantize(np.ascontiguousarray(values.float().numpy()), number_type)
        writer.add_tensor(f"{gguf_name}.{kind}", data, raw_dtype=number_type)


def _as_llama_cpp(model: PreTrainedModel, architecture: Architecture, name: str, tensor: Tensor) -> Tensor:
    """Return a weight in llama.cpp's order: matrices as (out, in), and heads in the order of its rotation."""
    module, _, kind = name.rpartition(".")
    if model.config.model_type == "gpt2" and kind == "weight" and module.endswith(LINEAR_MODULES):
        return tensor.T
    if architecture.pairs_neighbors and module.endswith(("q_proj", "k_proj")):
        halves: Tensor = tensor.unflatten(0, (-1, 2, _head_dim(model.config) // 2))
        return halves.transpose(1, 2).flatten(0, 2)
    return tensor


def _number_type(gguf_name: str, values: Tensor, weight_type: WeightType) -> GGMLQuantizationType:
    if values.dim() == 1 or gguf_name in ALWAYS_FLOAT32:
        return GGMLQuantizationType.F32
    if weight_type.matrices is GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        return GGMLQuantizationType.F32  # its largest number is 65,504
    return weight_type.embeddings if gguf_name in EMBEDDINGS else weight_type.matrices
