"""Write a GPT-2 as a GGUF file for llama.cpp; needs the package `gguf`."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from fgpt_hf.convert.layouts import LINEAR_MODULES
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_file

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three ways to compute the same function
PRE_TOKENIZER = "gpt-2"  # llama.cpp's name for GPT-2's pattern that splits text into words


def write_gguf_file(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write the weights as float32, the shape, the tokenizer and the chat template into one file.

    Raises:
        UserError: the name does not end in .gguf, or llama.cpp's GPT-2 lacks the activation function.
    """
    if file.suffix != ".gguf":
        raise UserError(f"{file}: the name of a GGUF file must end in .gguf")
    activation = model.config.activation_function
    if activation not in TANH_GELU:
        raise UserError(
            f"llama.cpp's GPT-2 cannot express hidden_act={activation!r}, only {TANH_GELU[0]!r}; export to gpt2 or "
            "onnx instead"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
        _add_shape(writer, model.config, file.stem)
        _add_tokenizer(writer, tokenizer, model)
        _add_weights(writer, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, model: GPT2LMHeadModel) -> None:
    """Add a token for each row of the embeddings; those that the tokenizer does not know are marked as unused."""
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
    writer.add_add_bos_token(False)
    ends = model.generation_config.eos_token_id
    turn_ends = {*(ends if isinstance(ends, list) else [ends])} - {tokenizer.eos_token_id, None}
    if turn_ends:
        writer.add_eot_token_id(min(turn_ends))  # there is room for one
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _token_type(index: int, vocabulary: dict[int, str], control: set[int]) -> gguf.TokenType:
    if index not in vocabulary:
        return gguf.TokenType.UNUSED
    return gguf.TokenType.CONTROL if index in control else gguf.TokenType.NORMAL


def _add_weights(writer: gguf.GGUFWriter, model: GPT2LMHeadModel) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # llama.cpp uses the embeddings if there is no head
        module, _, kind = name.rpartition(".")
        values = tensor.T if kind == "weight" and module.endswith(LINEAR_MODULES) else tensor
        gguf_name = names.get_name(module.removeprefix("transformer."))
        writer.add_tensor(f"{gguf_name}.{kind}", np.ascontiguousarray(values.float().numpy()))
