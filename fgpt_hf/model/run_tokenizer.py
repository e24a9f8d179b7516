"""The tokenizer of a run: the one that it names, its model's, or else the project's."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import load_tokenizer, model_name
from fgpt_hf.tokenizer.tokenizer import build_tokenizer

ROWS_MULTIPLE = 64
UNUSED_ROWS = 8  # at least: tuning tells by them which tokens the base run never saw


def run_tokenizer(source: TextSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the documents of a run are encoded with.

    Raises:
        UserError: there is no such tokenizer, or its files are damaged.

    Example:
        >>> run_tokenizer(TextSource(max_position_embeddings=512)).model_max_length
        512
    """
    name = source.tokenizer or getattr(source, "model_name_or_path", None)
    if name is None:
        return build_tokenizer(source.max_position_embeddings)
    try:
        tokenizer = load_tokenizer(model_name(name), trust_remote_code=getattr(source, "trust_remote_code", False))
    except UserError as error:
        is_missing = isinstance(error.__cause__, OSError) or _is_without_tokenizer(Path(name))
        if source.tokenizer is None or not is_missing:
            raise
        raise UserError(
            f"no tokenizer {name!r}: give a folder, such as `fgpt tokenizer` writes, or the id of a model on the Hub"
        ) from error
    if source.tokenizer is not None:
        tokenizer.model_max_length = source.max_position_embeddings  # of the network that is made for it
    return tokenizer


def _is_without_tokenizer(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.rglob("tokenizer*"))


def vocabulary_of(source: TextSource) -> dict[str, Any]:
    """Return what the configuration of a new network says of a run's own tokenizer; nothing for the project's.

    The embeddings have a row for each token, and eight more or as many as make a multiple of 64, which GPUs multiply
    faster.

    Raises:
        UserError: there is no such tokenizer, its files are damaged, or it has no end of text.

    Example:
        >>> vocabulary_of(TextSource())
        {}
    """
    if source.tokenizer is None:
        return {}
    # Its packages are not on every machine that estimates.
    from fgpt_hf.tokenizer.document_encoder import DocumentEncoder

    encoder = DocumentEncoder.of(run_tokenizer(source))
    rows = -(-(encoder.vocab_size + UNUSED_ROWS) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    end = encoder.start if encoder.end is None else encoder.end
    return {"vocab_size": rows, "bos_token_id": encoder.start, "eos_token_id": end, "pad_token_id": encoder.pad}
