"""A name becomes a `datasets` data set: a short name of this project, a data set on the Hub, or a file."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetBuilder, load_dataset_builder
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HFValidationError

from fgpt_hf.errors import UserError
from fgpt_hf.retries import reading, retry

FILE_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz", ".xz", ".bz2", ".zst"}


class DatasetRegistry(NamedTuple):
    """What is known of one kind of data by a short name: built here, on the Hub with a configuration, or behind a URL.

    Attributes:
        kind: what an error calls it: "corpus".
    """

    kind: str
    embedded: Mapping[str, Callable[[], Dataset]] = {}
    on_hub: Mapping[str, tuple[str, str | None]] = {}
    files: Mapping[str, str] = {}


class MixtureEntry(NamedTuple):
    """One data set of a mixture: at most `most` of its rows, each `times` an epoch."""

    name: str
    most: int | None = None
    times: float = 1.0


def parse_mixture(text: str) -> list[MixtureEntry]:
    """The data sets that `NAME[:MOST][*TIMES],…` names: `pydocs-chat:2000,rasbt-instruct*3`.

    Raises:
        UserError: a name is empty or twice there, or a number is not above zero.
    """
    shares = [_share(entry.strip(), text) for entry in text.split(",")]
    names = [share.name for share in shares]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"dataset_name={text}: {twice} is there twice; give it once, as {twice}*2 to have it twice")
    return shares


def _share(entry: str, text: str) -> MixtureEntry:
    found = re.fullmatch(r"(?P<name>[^*]+?)(:(?P<most>\d+))?(\*(?P<times>\d+(\.\d+)?))?", entry)
    most, times = (int(found["most"]) if found["most"] else None, float(found["times"] or 1)) if found else (0, 0.0)
    if found is None or most == 0 or times == 0:
        raise UserError(
            f"dataset_name={text}: {entry!r} is not NAME, NAME:MOST, NAME*TIMES or NAME:MOST*TIMES with numbers above "
            "zero, such as pydocs-chat:2000 or rasbt-instruct*3"
        )
    return MixtureEntry(found["name"], most, times)


def open_rows(
    names: DatasetRegistry,
    name: str,
    split: str = "train",
    configuration: str | None = None,
    revision: str | None = None,
) -> Dataset:
    """The rows of one data set, on this machine. `split` is that of a data set which has no short name.

    Raises:
        UserError: there is none of that name, configuration or split, this user may not read it, or it is damaged.
    """
    if name in names.embedded:
        return names.embedded[name]()
    split = "train" if name in (*names.on_hub, *names.files) else split
    builder = find_builder(names, name, configuration, revision)
    try:
        with reading(name):
            retry(name, builder.download_and_prepare)
    except DatasetGenerationError as error:
        raise UserError(f"{name} cannot be read, it may be damaged: {error.__cause__ or error}") from error
    splits = list(builder.info.splits or ())
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}, only {', '.join(splits)}: give one as dataset_train_split")
    return builder.as_dataset(split=split)  # type: ignore[return-value]


def find_builder(names: DatasetRegistry, name: str, configuration: str | None, revision: str | None) -> DatasetBuilder:
    """Return what builds the data set of a name that is not embedded.

    Raises:
        UserError: there is none of that name or configuration, this user may not read it, or the network is down.
    """
    with reading(name):
        return _find_builder(names, name, configuration, revision)


def _find_builder(names: DatasetRegistry, name: str, configuration: str | None, revision: str | None) -> DatasetBuilder:
    if name in names.files:
        return _from_url(name, names.files[name])
    if not name.strip():
        raise UserError(_unknown(names, name))
    path = Path(name)
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    if suffixes and suffixes[-1] in FILE_FORMATS and not path.is_dir():
        if not path.is_file():
            raise UserError(f"dataset_name={path}: there is no such file")
        if not path.stat().st_size:
            raise UserError(f"dataset_name={path}: the file is empty")
        file_format = FILE_FORMATS[suffixes[-1]]
        paragraphs = {"sample_by": "paragraph"} if file_format == "text" else {}
        return load_dataset_builder(file_format, data_files=str(path.resolve()), **paragraphs)
    return _from_hub(names, name, configuration, revision)


def _from_url(name: str, url: str) -> DatasetBuilder:
    try:
        return retry(name, lambda: load_dataset_builder(FILE_FORMATS[Path(url).suffix], data_files=url))
    except FileNotFoundError as error:
        raise UserError(
            f"{name} is at {url}, which cannot be reached: give the path of a copy of that file as the name"
        ) from error


def _from_hub(names: DatasetRegistry, given: str, configuration: str | None, revision: str | None) -> DatasetBuilder:
    name, known_configuration = names.on_hub.get(given, (given, None))
    configuration = configuration or known_configuration
    try:
        return retry(name, lambda: load_dataset_builder(name, configuration, revision=revision))
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                f"{name} is gated: accept its conditions at https://huggingface.co/datasets/{name} and log in with "
                "`hf auth login`, or set HF_TOKEN"
            ) from error
        raise UserError(_unknown(names, given)) from error
    except HFValidationError as error:
        raise UserError(_unknown(names, given)) from error
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise UserError(f"{given!r} holds no data files in a format that `datasets` reads") from error
    except ValueError as error:  # what `datasets` says of a configuration names those that exist
        raise UserError(f"dataset_name={given}, dataset_config_name={configuration}: {error}") from error


def _unknown(names: DatasetRegistry, name: str) -> str:
    known = ", ".join([*names.embedded, *names.on_hub, *names.files])
    return (
        f"no {names.kind} {name!r}, or none that you may read: give one of {known}, the id of a data set on the Hub, a "
        f"folder of data files, or a file ending in {', '.join(FILE_FORMATS)}"
    )
