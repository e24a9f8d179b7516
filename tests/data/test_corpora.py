"""A name becomes shards of documents, and what is wrong with it is one line."""

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data import corpora
from fgpt_hf.data.conversations import load_conversations
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.mixtures import RowIssues
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.data.sources import CORPORA
from fgpt_hf.data.stream import EpochPosition, read_buffers
from fgpt_hf.errors import UserError
from tests.support.fineweb import CARD, documents, write_shard, write_shards
from tests.support.loopback_hub import LoopbackHub, hub_environment

ROOT = Path(__file__).parents[2]


BEGINNING = ShardPosition()


def source(name: object, **settings: object) -> TextSource:
    return TextSource(dataset_name=str(name), **settings)


def read(shard: Shard, start: ShardPosition = BEGINNING) -> list[str | None]:
    return [text for texts, _ in shard.read(start) for text in texts]


def read_all(name: object, **settings: object) -> list[str | None]:
    return [text for shard in open_corpus(source(name, **settings)) for text in read(shard)]


# formats


def test_parquet_json_lines_and_text_give_their_documents(tmp_path: Path) -> None:
    texts = documents(7)
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    write_shard(tmp_path / "a.parquet", texts)
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"):
        assert read_all(tmp_path / name) == texts, name


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_shard(tmp_path / f"{number}.parquet", [f"document {number}"])
    assert read_all(tmp_path) == ["document 0", "document 1", "document 2"]


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", documents(2))
    assert read_all(tmp_path / "a.parquet", text_column_name="url") == [f"https://example.org/{n}" for n in range(2)]


def test_a_known_corpus_comes_in_a_random_order_that_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(50)
    monkeypatch.setitem(CORPORA.embedded, "poems", lambda: Dataset.from_dict({"text": texts}))
    monkeypatch.setattr(corpora, "DOCUMENTS_AT_ONCE", 20)
    assert read_all("poems") == read_all("poems") != texts
    assert sorted(read_all("poems")) == sorted(texts)  # type: ignore[type-var]
    (shard,) = open_corpus(source("poems"))
    assert [position for _, position in shard.read(ShardPosition(0, 7))] == [(0, 20), (0, 40), (0, 50)]
    assert read(shard, ShardPosition(0, 7)) == read(shard)[7:]


@pytest.mark.slow
@pytest.mark.parametrize("row_group_size", [7, 1000, 5000])
def test_reading_goes_on_at_any_position(tmp_path: Path, row_group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "DOCUMENTS_AT_ONCE", 10)
    monkeypatch.setattr("fgpt_hf.data.local_text.DOCUMENTS_AT_ONCE", 10)
    texts = documents(53, most_words=5)
    write_shard(tmp_path / "a.parquet", texts, row_group_size)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("a.parquet", "a.jsonl"):
        (shard,) = open_corpus(source(tmp_path / name))
        seen = 0
        for batch, position in shard.read(ShardPosition()):
            seen += len(batch)
            assert read(shard, position) == texts[seen:]
        assert seen == len(texts)
    (shard,) = open_corpus(source(tmp_path / "a.parquet"))
    assert read(shard, ShardPosition(0, 3)) == texts[3:]  # inside what is read at once


def test_a_file_that_changes_has_another_version_and_the_same_name(tmp_path: Path) -> None:
    shards, versions = [], []  # type: ignore[var-annotated]
    for count in (2, 3):
        write_shard(tmp_path / "a.parquet", documents(count))
        shards += open_corpus(source(tmp_path / "a.parquet"))
        versions.append(shards[-1].version)
    assert versions[0] != versions[1]
    assert shards[0].name == shards[1].name == str(tmp_path / "a.parquet")


# bad input


def test_a_corpus_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_corpus(source(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="no corpus 'py docs'.*pydocs, fineweb-edu"):
        open_corpus(source("py docs"))


GOOD = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(9))
DAMAGED = {
    "torn.jsonl": GOOD[:-9].encode(),
    "cut.jsonl.gz": gzip.compress(GOOD.encode())[:-20],
    "text.jsonl.gz": GOOD.encode(),
    "text.jsonl.bz2": b"BZh9" + GOOD.encode(),
    "cut.jsonl.xz": lzma.compress(GOOD.encode())[:-20],
    "text.parquet": GOOD.encode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        list(read_buffers(open_corpus(source(tmp_path / name)), EpochPosition()))
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load_conversations(InstructRun(dataset_name=str(tmp_path / name), bad_rows="refuse"), RowIssues())


def test_a_file_without_the_column_of_the_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="b.jsonl has the columns other, and none of them holds text"):
        open_corpus(source(tmp_path))
    with pytest.raises(UserError, match="b.jsonl has no column 'text': text_column_name can be one of other"):
        open_corpus(source(tmp_path, text_column_name="text"))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder is empty; files may end in .txt, "):
        open_corpus(source(tmp_path))


def test_a_column_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_shard(tmp_path / "a.parquet", documents(2))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "title": "b"}\n')
    with pytest.raises(ValueError, match="no column 'body'.*can be one of text, id, dump"):
        read_all(tmp_path / "a.parquet", text_column_name="body")
    with pytest.raises(ValueError, match="no column 'body'.*can be one of text, title"):
        read_all(tmp_path / "a.jsonl", text_column_name="body")


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"a", b"b"]])
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, values: list[object]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has the columns text, and none of them holds text"):
        read_all(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="in its column 'text' .row 1., and documents are text"):
        read_all(tmp_path / "a.parquet", text_column_name="text")


def test_the_names_of_splits_mean_nothing_on_this_machine(tmp_path: Path) -> None:
    for name in ("train", "test", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"a {name}"}) + "\n")
    assert read_all(tmp_path) == ["a test", "a train", "a validation"]


# a Hub

MESSAGES = """
import json, sys
from fgpt_hf.data.corpora import open_corpus
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.config.data_options import TextSource

def message(settings):
    try:
        shards = open_corpus(TextSource(**settings))
        return [text for shard in shards for texts, _ in shard.read(ShardPosition()) for text in texts]
    except ValueError as error:
        return str(error)

print(json.dumps([message(settings) for settings in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_names_on_a_hub_give_their_documents_or_say_what_is_wrong(hub_server: LoopbackHub, tmp_path: Path) -> None:
    texts = documents(5)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    sample = {"sample/10BT/0.parquet": write_shard(tmp_path / "0.parquet", texts)}
    dump = {"data/CC-MAIN-2024-10/0.parquet": write_shard(tmp_path / "1.parquet", texts[:2])}
    hub_server.add_repo("dataset", "HuggingFaceFW/fineweb-edu", {"README.md": CARD, **sample, **dump})
    hub_server.add_repo("dataset", "somebody/lines", {"train.jsonl": lines})
    hub_server.add_repo("dataset", "somebody/gated", {"train.jsonl": lines}, gated=True)
    hub_server.add_repo("dataset", "somebody/secret", {"train.jsonl": lines}, private=True)
    hub_server.add_repo("dataset", "somebody/tests", {"test.jsonl": lines})
    hub_server.add_repo("dataset", "somebody/empty", {"README.md": "nothing"})
    first = hub_server.repo("dataset", "somebody/lines").at("main").oid
    hub_server.repo("dataset", "somebody/lines").add({"train.jsonl": lines + lines})
    expected: list[tuple[dict[str, str], list[str] | str]] = [
        ({"dataset_name": "fineweb-edu"}, texts),
        ({"dataset_name": "fineweb-edu", "dataset_config_name": "default"}, texts[:2]),
        ({"dataset_name": "somebody/lines"}, texts + texts),
        ({"dataset_name": "somebody/lines", "dataset_revision": first}, texts),
        ({"dataset_name": "fineweb-edu", "dataset_config_name": "sample-1BT"}, "Available: ['default', 'sample-10BT']"),
        ({"dataset_name": "fineweb-edu", "text_column_name": "body"}, "can be one of text, id, dump"),
        ({"dataset_name": "fineweb-edu", "text_column_name": "score"}, "holds double in its column 'score'"),
        ({"dataset_name": "somebody/none"}, "no corpus 'somebody/none', or none that you may read"),
        ({"dataset_name": "somebody/secret"}, "no corpus 'somebody/secret', or none that you may read"),
        ({"dataset_name": "somebody/gated"}, "is gated: accept its conditions at https://huggingface.co/datasets/"),
        ({"dataset_name": "somebody/tests"}, "has no split 'train', only test"),
        ({"dataset_name": "somebody/empty"}, "holds no data files"),
    ]
    command = [sys.executable, "-c", MESSAGES, json.dumps([settings for settings, _ in expected])]
    environment = hub_environment(hub_server, tmp_path, token=None)
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    for (settings, wanted), found in zip(expected, json.loads(done.stdout), strict=True):
        assert wanted in found if isinstance(wanted, str) else wanted == found, settings
