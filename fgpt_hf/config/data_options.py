"""Groups of options on the data of a run: documents, or rows of conversations and pairs."""

from dataclasses import dataclass
from typing import Literal

from fgpt_hf.config.options import option

BadRows = Literal["skip", "refuse"]
LongRows = Literal["cut", "skip", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Which documents are read, and which of them are held out for validation."""

    dataset_name: str = option(
        "fineweb-edu",
        "Documents to train on: a known corpus, a dataset on the Hub, a prepared folder, a file, a folder, or a glob "
        "of files; or a mixture NAME:MAX_ROWS*REPEATS,… that takes at most MAX_ROWS of each, REPEATS times an epoch.",
        fixed_on_resume=True,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a dataset on the Hub, such as sample-100BT.", fixed_on_resume=True
    )
    dataset_revision: str | None = option(None, "Commit of a dataset on the Hub.", unset="the newest")
    text_column_name: str | None = option(
        None,
        "Column that holds the documents.",
        unset="text, or else content, document, body or the only column of text",
        fixed_on_resume=True,
    )
    document_separator: str | None = option(
        None,
        r"Text between the documents of a file, with \n for a line end and \t for a tab.",
        unset="a line of <|endoftext|>; a file without one is one document",
        fixed_on_resume=True,
    )
    encoding: str | None = option(
        None, "Encoding of files on this machine, such as cp1252.", unset="detected", fixed_on_resume=True
    )
    validation_fraction: float = option(
        0.01,
        "Fraction of the documents to hold out for validation, chosen by hash: at least one document, or none with 0.",
        minimum=0,
        below=1,
        fixed_on_resume=True,
    )
    validation_dataset: str | None = option(
        None,
        "Documents to hold out instead of validation_fraction, in the form of dataset_name. Those that dataset_name "
        "holds too are not trained on.",
        unset="a fraction of dataset_name",
        fixed_on_resume=True,
    )

    @property
    def holds_out(self) -> bool:
        """Whether some documents are for validation."""
        return self.validation_dataset is not None or self.validation_fraction > 0


@dataclass(frozen=True, kw_only=True)
class TextSource(Documents):
    """How documents become rows of tokens."""

    max_position_embeddings: int = option(
        1024, "Context of the model and length of a training row, in tokens.", fixed_on_resume=True
    )
    tokenizer: str | None = option(
        None,
        "Tokenizer of the documents: its folder, or the id of a model on the Hub.",
        unset="that of the model to start from, or else GPT-2's with tokens for conversations",
        fixed_on_resume=True,
    )
    preprocessing_num_workers: int | None = option(
        None, "Number of processes that tokenize.", unset="one per core to prepare, two to stream"
    )


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Which rows are read, which of them are held out for validation, and what happens to unusable ones."""

    dataset_name: str = option(
        "smol-smoltalk",
        "Conversations to train on: a known dataset, one on the Hub, or a file, a folder or a glob of files; or a "
        "mixture NAME:MAX_ROWS*REPEATS,… that takes at most MAX_ROWS of each, REPEATS times an epoch.",
        fixed_on_resume=True,
    )
    encoding: str | None = option(
        None, "Encoding of files on this machine, such as cp1252.", unset="detected", fixed_on_resume=True
    )
    dataset_config_name: str | None = option(
        None, "Configuration of datasets on the Hub that have no short name.", fixed_on_resume=True
    )
    dataset_revision: str | None = option(
        None, "Commit of datasets on the Hub that have no short name.", unset="the newest"
    )
    dataset_train_split: str = option(
        "train", "Split of datasets on the Hub that have no short name.", fixed_on_resume=True
    )
    validation_fraction: float = option(
        0.05,
        "Fraction of the rows to hold out for validation, chosen by hash: at least one row, or none with 0.",
        minimum=0,
        below=1,
        fixed_on_resume=True,
    )
    validation_dataset: str | None = option(
        None,
        "Rows to hold out instead of validation_fraction, in the form of dataset_name. Those that dataset_name holds "
        "too are not trained on.",
        unset="a fraction of dataset_name",
        fixed_on_resume=True,
    )
    max_length: int | None = option(
        None, "Maximum number of tokens per sequence.", unset="the model's context", fixed_on_resume=True
    )
    bad_rows: BadRows = option(
        "skip", "Malformed rows: skip them with a warning, or refuse the dataset.", fixed_on_resume=True
    )
    long_rows: LongRows = option(
        "cut",
        "Rows longer than max_length: cut or skip them with a warning, or refuse the dataset.",
        fixed_on_resume=True,
    )
