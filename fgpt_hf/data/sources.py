"""Open the dataset of a name: one of this project's short names, or a dataset on the Hub.

The rows of a dataset opened here are downloaded to this machine; for a corpus that does not fit on its disk,
`corpora.open_corpus` streams documents. Files on this machine are read by `local_text` and `local_rows`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, DatasetBuilder, load_dataset_builder
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HFValidationError

from fgpt_hf.data.basic_qa import load_basic_qa
from fgpt_hf.data.local_files import FORMATS, is_local
from fgpt_hf.data.local_rows import LocalRows, load_local_rows
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.pydocs_derived import load_pydocs_chat, load_pydocs_preference
from fgpt_hf.data.splits import Sizes
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.retries import READ_ERRORS, reading, retry

HELD_OUT_SPLITS = ("validation", "test")
RASCHKA = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07"


class HubDataset(NamedTuple):
    """A dataset on the Hub, and its configuration if it has several."""

    repo_id: str
    configuration: str | None = None


class DatasetRegistry(NamedTuple):
    """The short names of one kind of data.

    Attributes:
        kind: the kind in an error message, such as "corpus".
        embedded: datasets that are built on this machine, without a network.
        on_hub: datasets on the Hub.
        files: files at a URL.
    """

    kind: str
    embedded: Mapping[str, Callable[[], Dataset]] = {}
    on_hub: Mapping[str, HubDataset] = {}
    files: Mapping[str, str] = {}

    @property
    def names(self) -> list[str]:
        """All short names."""
        return [*self.embedded, *self.on_hub, *self.files]


CORPORA = DatasetRegistry(
    "corpus",
    embedded={"pydocs": load_pydocs},
    on_hub={"fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT")},
)
CONVERSATIONS = DatasetRegistry(
    "conversations",
    embedded={"pydocs-chat": load_pydocs_chat, "basic-qa": load_basic_qa},
    on_hub={
        "smol-smoltalk": HubDataset("HuggingFaceTB/smol-smoltalk"),
        "alpaca-cleaned": HubDataset("yahma/alpaca-cleaned"),
        "oasst1": HubDataset("OpenAssistant/oasst1"),
    },
    files={"rasbt-instruct": f"{RASCHKA}/01_main-chapter-code/instruction-data.json"},
)
PREFERENCES = DatasetRegistry(
    "preference data",
    embedded={"pydocs-preference": load_pydocs_preference},
    files={"rasbt-preference": f"{RASCHKA}/04_preference-tuning-with-dpo/instruction-data-with-preference.json"},
)


@dataclass(frozen=True)
class DataProvenance:
    """What is known of a run's data, for its model card.

    Attributes:
        sizes: the documents, conversations or pairs of each split, and their tokens.
        source: fields of a run that describe the text, if the run itself only names rows made from it.
    """

    sizes: Sizes = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)


def on_hub(name: str) -> HubDataset | None:
    """Return the dataset on the Hub that a name stands for, or None if it is built here, or is a file or folder.

    Example:
        >>> on_hub("fineweb-edu")
        HubDataset(repo_id='HuggingFaceFW/fineweb-edu', configuration='sample-10BT')
        >>> on_hub("somebody/lines")
        HubDataset(repo_id='somebody/lines', configuration=None)
        >>> on_hub("pydocs"), on_hub("data/lines.jsonl"), on_hub("rasbt-instruct")
        (None, None, None)
    """
    for registry in (CORPORA, CONVERSATIONS, PREFERENCES):
        if name in registry.on_hub:
            return registry.on_hub[name]
        if name in registry.names:
            return None
    return None if is_local(name) else HubDataset(name)


def load_rows(
    registry: DatasetRegistry,
    name: str,
    split: str | None = "train",
    configuration: str | None = None,
    revision: str | None = None,
    encoding: str | None = None,
) -> Dataset | LocalRows:
    """Return the rows of one dataset, downloaded if need be.

    Args:
        split: the split of a dataset that has no short name, or None for the one to hold out; files on this machine
            have none.
        configuration, revision: those of a dataset on the Hub.
        encoding: that of files on this machine; None to recognize it.

    Raises:
        UserError: there is no dataset of that name, configuration or split, this user may not read it, it is damaged,
            or the network is down.
    """
    if name in registry.embedded:
        return registry.embedded[name]()
    if name not in registry.names and is_local(name):
        return load_local_rows(name, encoding)
    builder = find_builder(registry, name, configuration, revision)
    with reading(name), reading_with_datasets(name):
        retry(name, builder.download_and_prepare)
    splits = list(builder.info.splits or ())
    if split is None:
        split = validation_split(name, splits)
    elif name in registry.names:
        split = "train"
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}, only {', '.join(splits)}: give one as dataset_train_split")
    return builder.as_dataset(split=split)


def validation_split(name: str, splits: Sequence[str]) -> str:
    """Return the split of a dataset on the Hub that is held out: `validation`, or `test`, or the only one.

    Raises:
        UserError: it has neither, and several others.

    Example:
        >>> validation_split("somebody/lines", ["train", "test"])
        'test'
    """
    usual = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    if usual is None and len(splits) != 1:
        raise UserError(
            f"validation_dataset={name} has no split {' or '.join(HELD_OUT_SPLITS)}, only {', '.join(splits)}"
        )
    return usual or splits[0]


@contextmanager
def reading_with_datasets(name: str) -> Iterator[None]:
    """Convert what `datasets` raises about the content of a dataset to a UserError; `READ_ERRORS` pass unchanged."""
    try:
        yield
    except (UserError, *READ_ERRORS):
        raise
    except (DatasetsError, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{name} cannot be read, it may be damaged: {reason}") from error


def find_builder(
    registry: DatasetRegistry, name: str, configuration: str | None, revision: str | None
) -> DatasetBuilder:
    """Return the builder of a dataset that is not embedded.

    Raises:
        UserError: there is no dataset of that name or configuration, this user may not read it, or the network is
            down.
    """
    if not name.strip():
        raise _unknown_name(registry, name)
    with reading(name):
        if name in registry.files:
            return _builder_of_url(name, registry.files[name])
        return _builder_on_hub(registry, name, configuration, revision)


def _builder_of_url(name: str, url: str) -> DatasetBuilder:
    try:
        return retry(name, lambda: load_dataset_builder("json", data_files=url))
    except FileNotFoundError as error:
        raise UserError(
            f"{name} is at {url}, which cannot be reached: give the path of a copy of that file as the name"
        ) from error


def _builder_on_hub(
    registry: DatasetRegistry, given: str, configuration: str | None, revision: str | None
) -> DatasetBuilder:
    name, known_configuration = registry.on_hub.get(given, HubDataset(given))
    configuration = configuration or known_configuration
    try:
        return retry(name, lambda: load_dataset_builder(name, configuration, revision=revision))
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                f"{name} is gated: accept its conditions at https://huggingface.co/datasets/{name} and log in with "
                "`hf auth login`, or set HF_TOKEN"
            ) from error
        raise _unknown_name(registry, given) from error
    except HFValidationError as error:
        raise _unknown_name(registry, given) from error
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise UserError(f"{given!r} holds no data files in a format that `datasets` reads") from error
    except FileNotFoundError as error:
        raise _unknown_name(registry, given) from error
    except RuntimeError as error:  # a dataset that is a script
        raise UserError(f"{given!r} cannot be read: {error}") from error
    except ValueError as error:  # the message of `datasets` lists the configurations that exist
        raise UserError(f"dataset_name={given}, dataset_config_name={configuration}: {error}") from error


def _unknown_name(registry: DatasetRegistry, name: str) -> UserError:
    return UserError(
        f"no {registry.kind} {name!r}, or none that you may read: give one of {', '.join(registry.names)}, the id of a "
        f"dataset on the Hub, or a folder or a glob of files, or a file, that end in {', '.join(FORMATS)}"
    )
