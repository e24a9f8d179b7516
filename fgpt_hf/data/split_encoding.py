"""Encode the documents of each split, also in processes that tokenize for another one.

These start with this module, so it imports neither torch nor datasets.
"""

from collections.abc import Sequence

from fgpt_hf.data.splits import ValidationRule, split_texts
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder

_KEPT_ENCODERS: list[DocumentEncoder] = []  # of a process that tokenizes for another one


def encode_splits(
    texts: Sequence[str],
    rule: ValidationRule,
    splits: Sequence[str],
    repeats: float = 1.0,
    encoder: DocumentEncoder = PROJECT_ENCODER,
) -> dict[str, list[Ids]]:
    """Return the token ids of the documents in each of `splits`, as `split_texts` chooses them."""
    chosen = split_texts(texts, rule, splits, repeats)
    return {split: encoder.encode(members, threads=1) for split, members in chosen.items()}


def keep_encoder(encoder: DocumentEncoder) -> None:
    """Set the encoder of this process, which gets it once: it may hold megabytes."""
    _KEPT_ENCODERS[:] = [encoder]


def encode_with_kept_encoder(
    texts: Sequence[str], rule: ValidationRule, splits: Sequence[str], repeats: float
) -> dict[str, list[Ids]]:
    """Do what `encode_splits` does, in a process that keeps its encoder."""
    return encode_splits(texts, rule, splits, repeats, _KEPT_ENCODERS[0])
