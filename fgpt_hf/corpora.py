"""Which text: a name becomes documents, and a hash of each document says whether it is trained on or held out."""

from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from fgpt_hf.pydocs import load_pydocs
from fgpt_hf.runs import BaseRun

CORPORA: Mapping[str, Callable[[], Dataset]] = {"pydocs": load_pydocs}

HUB_NAMES = {"fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT")}

FILE_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Corpus(NamedTuple):
    """Documents as data sets with a column `text`."""

    train: Dataset
    held_out: Dataset


def load_corpus(run: BaseRun) -> Corpus:
    """The documents of `run.dataset_name`, split by `is_held_out`; the held-out ones in the order of their hashes.

    Raises:
        ValueError: no such corpus, configuration or column; no documents; a share that leaves a split empty.
    """
    documents = _documents(run)
    hashes = np.array([document_hash(text) for text in documents["text"]], dtype=np.float64)
    held_out = np.flatnonzero(hashes < run.held_out_share)
    train = np.flatnonzero(hashes >= run.held_out_share)
    for name, members in (("trained on", train), ("held out", held_out)):
        if not len(members):
            raise ValueError(
                f"held_out_share={run.held_out_share} leaves none of the {len(documents)} documents of "
                f"{run.dataset_name!r} to be {name}: choose another share"
            )
    return Corpus(documents.select(train), documents.select(held_out[np.argsort(hashes[held_out], kind="stable")]))


def document_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on any machine, in any order and process."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _documents(run: BaseRun) -> Dataset:
    documents = CORPORA[run.dataset_name]() if run.dataset_name in CORPORA else _load(run)
    column = run.text_column_name
    if column not in documents.column_names:
        columns = ", ".join(documents.column_names)
        raise ValueError(f"{run.dataset_name!r} has no column {column!r}: text_column_name can be one of {columns}")
    documents = documents.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
    documents = documents.filter(lambda texts: [isinstance(text, str) and bool(text) for text in texts], **_BY_TEXT)
    if not len(documents):
        raise ValueError(f"{run.dataset_name!r} holds no text in its column {column!r}")
    return documents


def _load(run: BaseRun) -> Dataset:
    path = Path(run.dataset_name)
    name, configuration = HUB_NAMES.get(run.dataset_name, (run.dataset_name, None))
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise ValueError(f"dataset_name={run.dataset_name}: there is no such file")
        paragraphs = {"sample_by": "paragraph"} if FILE_FORMATS[path.suffix] == "text" else {}
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", **paragraphs)
    try:
        return load_dataset(name, run.dataset_config_name or configuration, split="train")
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"no corpus {run.dataset_name!r}: give one of {', '.join([*CORPORA, *HUB_NAMES])}, the id of a data set on "
            f"the Hub, or a file ending in {', '.join(FILE_FORMATS)}"
        ) from error


_BY_TEXT = {"input_columns": "text", "batched": True}
