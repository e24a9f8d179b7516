"""Find which documents of a corpus to hold out, by reading it once where that is cheap."""

from collections.abc import Sequence

from fsspec.core import url_to_fs

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.corpora import Shard
from fgpt_hf.data.sources import CORPORA
from fgpt_hf.data.splits import NONE_HELD_OUT, ValidationRule, document_hash, validation_threshold
from fgpt_hf.data.stream import EpochPosition, read_buffers
from fgpt_hf.retries import reading, retry
from fgpt_hf.tokenizer.document_encoder import encode_documents

MAX_DOCUMENTS = 100_000  # of more, the fraction below a threshold is near enough to the fraction of the documents
MAX_REMOTE_FILES, MAX_REMOTE_BYTES = 32, 64_000_000  # seconds to read, and in more there are documents enough
BOUNDARIES = ("\n\n", "\n", " ")  # where a lone document is best cut: a paragraph's end, a line's, a word's
MAX_LONE_FRACTION = 5  # at least this many tokens of a short lone document for each one that is held out to fill a row


def validation_rule(source: TextSource, shards: Sequence[Shard]) -> ValidationRule:
    """Return the rule by which the documents of `shards`, which `source` names, are held out.

    Documents on this machine, and those of a small dataset on the Hub, are read and counted, up to `MAX_DOCUMENTS`.
    For a larger stream and for an embedded corpus, the threshold is the fraction as it is: the former is not read for
    it, and a document of the latter has the same split in all datasets that are made from it. With a validation set of
    the user's own, no other document is held out.

    Raises:
        UserError: a shard cannot be read, or holds no text in that column.

    Example:
        >>> import pathlib, tempfile
        >>> from fgpt_hf.data.corpora import open_corpus
        >>> path = pathlib.Path(tempfile.mkdtemp(), "poems.jsonl")
        >>> _ = path.write_text('{"text": "Roses are red"}\\n{"text": "Violets are blue"}')
        >>> source = TextSource(dataset_name=str(path))
        >>> rule = validation_rule(source, open_corpus(source))
        >>> [rule.divide(text)[0][0] for text in ("Roses are red", "Violets are blue")]
        ['train', 'validation']
    """
    fraction = source.validation_fraction
    if source.validation_dataset or fraction == 0:
        return NONE_HELD_OUT
    remote = [file for shard in shards for file in shard.name.split(", ") if "://" in file]
    if source.dataset_name in CORPORA.embedded or not _is_small(remote):
        return ValidationRule(fraction)
    hashes: dict[float, None] = {}
    first: str | None = None
    for buffer in read_buffers(shards, EpochPosition()):
        for text in (text for block in buffer.blocks for text in block.texts):
            first = text if first is None else first
            hashes[document_hash(text)] = None
        if len(hashes) > MAX_DOCUMENTS:
            return ValidationRule(fraction)
    if len(hashes) == 1 and first is not None and len(first) > 1:
        return ValidationRule(fraction, lone_document_cut(first, fraction, source.max_position_embeddings))
    return ValidationRule(validation_threshold(hashes, fraction))


def _is_small(urls: Sequence[str]) -> bool:
    """Return whether remote files are few and small enough to be read for the rule alone."""
    if len(urls) > MAX_REMOTE_FILES:
        return False
    return sum(map(_remote_size, urls)) <= MAX_REMOTE_BYTES


def _remote_size(url: str) -> int:
    """Return the bytes of a remote file, or of a small one too many if its server does not say."""
    with reading(url):
        system, path = url_to_fs(url)
        return int(retry(url, lambda: system.size(path)) or MAX_REMOTE_BYTES + 1)


def lone_document_cut(text: str, validation_fraction: float, row_length: int) -> int:
    """Return how many of a document's characters to train on; those after them are held out.

    The held-out end has the fraction of the tokens, but enough to fill a row unless that is more than a fifth of them.
    It begins with a paragraph, a line or a word.

    Args:
        text: at least two characters.

    Example:
        >>> text = "Once upon a time there was a king.\\n\\n" * 20
        >>> cut = lone_document_cut(text, validation_fraction=0.1, row_length=16)
        >>> len(text), text[cut:]
        (720, 'Once upon a time there was a king.\\n\\nOnce upon a time there was a king.\\n\\n')
    """
    tokens = len(encode_documents([text])[0])
    wanted = max(1, round(tokens * validation_fraction), min(row_length - 1, tokens // MAX_LONE_FRACTION))
    latest = min(max(1, len(text) - round(len(text) * wanted / tokens)), len(text) - 1)
    earliest = max(1, 2 * latest - len(text))  # the held-out end is at most twice as long as wanted
    for boundary in BOUNDARIES:
        found = text.rfind(boundary, 0, latest)
        cut = found + len(boundary)
        if found >= 0 and earliest <= cut <= latest and text[:cut].strip():
            return cut
    return latest
