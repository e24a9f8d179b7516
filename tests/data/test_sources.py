"""A name becomes a dataset, a mixture of names several, and what is wrong with either is one line."""

import gzip
from pathlib import Path

import pytest
from datasets import Dataset

from fgpt_hf.data.dataset_names import MixtureEntry, parse_mixture
from fgpt_hf.data.sources import DatasetRegistry, load_rows
from fgpt_hf.errors import UserError

NAMES = DatasetRegistry(
    "corpus",
    embedded={"own": lambda: Dataset.from_dict({"prompt": [1, 2]})},
    files={"far": "http://127.0.0.1:9/far.json"},
)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("one", [MixtureEntry("one")]),
        ("one:20, user/two*3", [MixtureEntry("one", 20), MixtureEntry("user/two", None, 3)]),
        ("one:20*0.5", [MixtureEntry("one", 20, 0.5)]),
        ("C:\\data\\rows.json:7", [MixtureEntry("C:\\data\\rows.json", 7)]),
    ],
)
def test_a_mixture_says_how_many_rows_and_how_often(text: str, entries: list[MixtureEntry]) -> None:
    assert parse_mixture(text) == entries


@pytest.mark.parametrize("text", ["", "one,", "one:0", "one*0", "one*much", "one*-1"])
def test_a_mixture_that_cannot_be_read_is_answered_with_one_that_can(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as pydocs-chat:2000 or rasbt-instruct\*3"):
        parse_mixture(text)


def test_a_name_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one is named twice; name it once, or as one\*2"):
        parse_mixture("one:5,two,one")


def test_embedded_rows_and_files_are_opened_alike(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": 1}, {"prompt": 2}]')
    (tmp_path / "rows.jsonl").write_text('{"prompt": 1}\n{"prompt": 2}\n')
    for name in ("own", str(tmp_path / "rows.json"), str(tmp_path / "rows.jsonl")):
        assert list(load_rows(NAMES, name)) == [{"prompt": 1}, {"prompt": 2}]


def test_what_cannot_be_opened_is_explained_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('[{"n": 1}, {"n": ')
    (tmp_path / "empty.jsonl").touch()
    answers = {
        (str(tmp_path / "empty.jsonl"), "train"): "empty.jsonl: the file is empty",
        ("", "train"): "no corpus '', or none that you may read",
        ("nowhere.json", "train"): "nowhere.json: there is no such file",
        (str(tmp_path / "torn.json"), "train"): "torn.json cannot be read, it may be damaged",
        ("no name", "train"): "no corpus 'no name', or none that you may read: give one of own, far",
    }
    for (name, split), answer in answers.items():
        with pytest.raises(ValueError) as error:
            load_rows(NAMES, name, split)
        assert answer in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('null\n{"n": 1}\n', "line 1 is null, and not a row"),
        ('{"n": 1}\n null\n', "line 2 is null, and not a row"),
        ('[null, {"n": 1}]', "item 1 is null, and not a row"),
        ("[\n null]", "item 1 is null, and not a row"),
        ("[" * 20_000, "nested too deeply"),
        ('{"n": 1}\n' + '{"n":' * 20_000, "line 2 is not JSON.* nested too deeply"),
    ],
    ids=range(6),
)
def test_json_that_holds_no_rows_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wb") as file:
        file.write(text.encode())
    with pytest.raises(UserError, match=said):
        load_rows(NAMES, str(tmp_path / name))
