"""The tokenizer of a run: the one that it names, its model's, or else the project's."""

from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.option_groups import TextSource
from fgpt_hf.model.io import load_tokenizer, model_name
from fgpt_hf.tokenizer.tokenizer import build_tokenizer


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
    return load_tokenizer(model_name(name), trust_remote_code=getattr(source, "trust_remote_code", False))
