"""GGUF files published with a model, and the files by which Ollama prompts it and knows where a reply ends."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.convert.export import write_gguf_named
from fgpt_hf.hub.published_files import Content
from fgpt_hf.tokenizer.tokenizer import build_tokenizer

# The names and the form of the Hub's documentation of Ollama: Go templates, of one turn.
TEMPLATE, PARAMETERS = "template", "params"
CHAT_TURN = """\
{{ if .System }}<|system|>
{{ .System }}<|end|>
{{ end }}{{ if .Prompt }}<|user|>
{{ .Prompt }}<|end|>
{{ end }}<|assistant|>
{{ .Response }}<|end|>
"""
TEXT = "{{ .Prompt }}"  # of a base model, which continues a text


def gguf_files(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    types: Sequence[str],
    is_chat_model: bool,
) -> dict[str, Content]:
    """Write a stock network as GGUF files, and return them with Ollama's files, by their path in the repo.

    A tokenizer with another chat template than FGPT's has no files for Ollama, which then goes by the GGUF file alone.

    Args:
        name: of the model: a file is called `NAME-TYPE.gguf`.
        types: of the weights, each as `fgpt export --outtype`.

    Raises:
        UserError: a type is unknown, llama.cpp cannot express the network, or the package `gguf` is missing.
    """
    paths = [write_gguf_named(network, tokenizer, folder, name, outtype) for outtype in dict.fromkeys(types)]
    files: dict[str, Content] = {path.name: path for path in paths}
    if tokenizer.chat_template == build_tokenizer().chat_template:
        parameters = {"num_ctx": network.config.max_position_embeddings, "stop": ["<|end|>", "<|endoftext|>"]}
        template = CHAT_TURN if is_chat_model else TEXT
        files |= {TEMPLATE: template.encode(), PARAMETERS: (json.dumps(parameters) + "\n").encode()}
    return files


def types_of(files: dict[str, Content]) -> tuple[str, ...]:
    """Return the types of the weights in GGUF files, from their names.

    Example:
        >>> types_of({"tiny-Q8_0.gguf": b"", "params": b""})
        ('Q8_0',)
    """
    return tuple(name.removesuffix(".gguf").rpartition("-")[2] for name in files if name.endswith(".gguf"))
