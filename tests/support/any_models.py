"""Small random models of several classes of transformers, each with a tokenizer of its own, made without a network.

    folder = save_any("qwen3", tmp_path / "qwen3")

| model    | tokenizer |
|----------|-----------|
| gpt2     | byte-level BPE, one token before each document, no padding token, no chat template |
| llama    | byte-level BPE with beginning and end of text, ChatML |
| qwen3    | more than 65,536 entries, ChatML |
| smollm3  | byte-level BPE with digits apart, as SmolLM2's; no chat template |
| nanochat | byte-level BPE with a template that marks the replies |
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SmolLM3Config,
)

from fgpt_hf.tokenizer.tokenizer import read_vocabulary

CONTEXT = 512
NAMES = ("gpt2", "llama", "qwen3", "smollm3", "nanochat")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.role }}: {{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TEXTS = [
    f"The {thing} of {place} is {adjective}, isn't it? {number} people say they'd like it.\n"
    for thing in ("capital", "river", "market", "weather")
    for place in ("France", "Japan", "Peru", "Kenya", "naïve Čechy")
    for adjective in ("old", "wide", "loud", "cold")
    for number in (3, 17, 240)
]


def save_any(name: str, folder: Path, **changes: Any) -> Path:
    """Write a complete model folder; `changes` are fields of the configuration."""
    tokenizer = any_tokenizer(name)
    any_model(name, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def any_model(name: str, **changes: Any) -> PreTrainedModel:
    """A network with weights so large that every token matters to every other one."""
    torch.manual_seed(0)
    model: PreTrainedModel = Auto.from_config(any_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0, std=0.15)
    return model


def any_config(name: str, **changes: Any) -> PreTrainedConfig:
    tokenizer = any_tokenizer(name)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **ids,
    }
    if name == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "vocab_size": len(tokenizer)}
        without_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        return GPT2Config(**{**small, **ids, **without_dropout, **changes})
    classes: dict[str, Any] = {"llama": LlamaConfig, "smollm3": SmolLM3Config, "nanochat": NanoChatConfig}
    if name == "qwen3":
        return Qwen3Config(**{**shape, "head_dim": 16, **changes})
    config: PreTrainedConfig = classes[name](**{**shape, **changes})
    return config


@lru_cache(maxsize=len(NAMES))
def any_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A new tokenizer of the kind that the table above says."""
    made = {
        "gpt2": lambda: _wrapped(_trained(), eos_token="<|endoftext|>", bos_token="<|endoftext|>"),
        "llama": _llama_tokenizer,
        "qwen3": lambda: _with_template(_wrapped(_large(), eos_token="<|im_end|>", pad_token="<|endoftext|>"), CHATML),
        "smollm3": lambda: _wrapped(_trained(digits_apart=True), eos_token="<|endoftext|>"),
        "nanochat": lambda: _with_template(
            _wrapped(_trained(), eos_token="<|im_end|>", bos_token="<|endoftext|>"), MARKED
        ),
    }[name]
    return made()


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


def _trained(digits_apart: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes]) if digits_apart else by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _large() -> Tokenizer:
    """GPT-2's merges, and as many more of its tokens by two as ids of 16 bits have no room for."""
    vocabulary, merges = read_vocabulary()
    del vocabulary["<|endoftext|>"]
    for left, right in _new_merges(vocabulary, 66_000 - len(vocabulary)):
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _new_merges(vocabulary: dict[str, int], count: int) -> Iterator[tuple[str, str]]:
    words = [token for token in vocabulary if token.isascii() and token.isalpha()][-400:]
    pairs = ((left, right) for left in words for right in words if left + right not in vocabulary)
    for _, pair in zip(range(count), pairs, strict=False):
        yield pair


def _llama_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = _trained()
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return _with_template(_wrapped(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"), CHATML)


def _wrapped(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **tokens)


def _with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    return tokenizer


def write_documents(path: Path) -> Path:
    """Write documents to train on, of which some are held out."""
    lines = [json.dumps({"text": " ".join(TEXTS[start : start + 1 + start % 3])}) for start in range(len(TEXTS) - 3)]
    path.write_text("\n".join(lines))
    return path


def write_chats(path: Path) -> Path:
    """Write conversations of one and two turns."""
    rows = []
    for number in range(60):
        turns = [("user", f"What is {number}?"), ("assistant", f"It is {number}, an old number.")]
        turns += [("user", "Is it?"), ("assistant", "It is.")] if number % 2 else []
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_pairs(path: Path) -> Path:
    """Write pairs of replies."""
    rows = [
        {"prompt": f"What is {number}?", "chosen": f"It is {number}, an old one.", "rejected": "I do not know."}
        for number in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
