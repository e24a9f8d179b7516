"""A validation set of the user's own: measured as it is, never trained on, whatever else names its documents."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun
from fgpt_hf.data import corpora, prepare
from fgpt_hf.data.instruct import load_instruct_data
from fgpt_hf.data.preference import load_preference_data
from fgpt_hf.data.pretraining import load_pretraining_data
from fgpt_hf.data.shard_records import total_size
from fgpt_hf.data.sources import CORPORA, validation_split
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import PAD_ID, build_tokenizer
from tests.support.tiny import CONTEXT, tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def text_of(rows: Any) -> str:
    return str(build_tokenizer().decode([token for token in np.asarray(rows).flatten().tolist() if token != PAD_ID]))


def base_run(**settings: Any) -> BaseRun:
    return BaseRun(max_position_embeddings=32, preprocessing_num_workers=1, **settings)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [True, False])
def test_exactly_its_documents_are_held_out_and_all_others_trained_on(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "test", "other"):
        (folder / f"{name}.txt").write_text(f"the text called {name}. " * 20)
    (folder / "copy.txt").write_text("the text called held. " * 20)
    (tmp_path / "held.md").write_text("the text called held. " * 20)
    names = f"{tmp_path / 'held.md'},{folder / 'test.txt'}"
    with caplog.at_level("INFO"):
        data = load_pretraining_data(
            base_run(dataset_name=str(folder), validation_dataset=names, validation_fraction=0.5, streaming=streaming)
        )
    held_out, trained = text_of(data.validation), text_of(data.batches(0, 1).take(60)["input_ids"])
    assert "called held" in held_out and "called test" in held_out
    assert "called train" in trained and "called other" in trained
    assert "called held" not in trained and "called test" not in trained and "called train" not in held_out
    assert f"left out, held out by validation_dataset: {folder / 'test.txt'}" in caplog.text
    assert "left out, a repetition of an earlier document" in caplog.text and "copy.txt" in caplog.text
    assert "held.md" in caplog.text and "2 files, 2 documents" in caplog.text


def test_streamed_and_prepared_rows_hold_out_the_same_and_a_change_of_it_is_another_corpus(tmp_path: Path) -> None:
    chance = random.Random(0)
    texts = [" ".join(str(chance.randint(0, 999)) for _ in range(chance.randint(5, 90))) for _ in range(400)]
    run = base_run(
        dataset_name=lines(tmp_path / "train.jsonl", [{"text": text} for text in texts[:200]]),
        validation_dataset=lines(tmp_path / "held.jsonl", [{"text": text} for text in texts[200:]]),
    )
    streamed, prepared = (load_pretraining_data(replace(run, streaming=mode)) for mode in (True, False))
    assert np.array_equal(streamed.validation, prepared.validation)
    assert prepared.provenance.sizes["train"].documents == prepared.provenance.sizes["validation"].documents == 200
    assert prepared.provenance.source["validation_dataset"] == run.validation_dataset
    state = streamed.batches(0, 1).state_dict()
    lines(tmp_path / "held.jsonl", [{"text": text} for text in texts[201:]])
    with pytest.raises(UserError, match="has changed since the checkpoint"):
        batches = load_pretraining_data(run).batches(0, 1)
        batches.load_state_dict(state)
        batches.take(1)


def test_prepared_rows_have_a_validation_set_of_their_own(tmp_path: Path) -> None:
    texts = lines(tmp_path / "texts.jsonl", [{"text": f"text {number} " * 20} for number in range(30)])
    run = base_run(dataset_name=texts, validation_dataset=lines(tmp_path / "held.jsonl", [{"text": "held out " * 20}]))
    records = prepare.prepare(run, tmp_path / "rows")
    assert total_size(records)["validation"].documents == 1
    own = base_run(dataset_name=str(tmp_path / "rows"))
    assert "held out" in text_of(load_pretraining_data(own).validation)
    with pytest.raises(UserError, match="leave validation_dataset out, or give it to `fgpt prepare`"):
        load_pretraining_data(replace(own, validation_dataset=texts))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("{held}*2", r"read once, so leave out \*2"),
        ("{empty}", "no text in validation_dataset="),
        ("{missing}", "there is no such file"),
    ],
)
def test_a_validation_set_that_cannot_be_is_refused(tmp_path: Path, names: str, reason: str) -> None:
    texts = lines(tmp_path / "texts.jsonl", [{"text": "one"}, {"text": "two"}])
    held = lines(tmp_path / "held.jsonl", [{"text": "three"}])
    (tmp_path / "empty.txt").write_text("")
    given = names.format(held=held, empty=tmp_path / "empty.txt", missing=tmp_path / "missing.txt")
    with pytest.raises(UserError, match=reason):
        load_pretraining_data(base_run(dataset_name=texts, validation_dataset=given))


def test_a_training_set_that_is_all_held_out_is_refused(tmp_path: Path) -> None:
    texts = lines(tmp_path / "texts.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(UserError, match="no text in .*texts.jsonl: 0 files, 0 documents"):
        load_pretraining_data(base_run(dataset_name=texts, validation_dataset=texts))


def test_a_known_corpus_is_not_trained_on_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr(corpora, "CORPORA", CORPORA._replace(embedded={"pydocs": lambda: few}))
    with pytest.raises(UserError, match=r"validation_dataset=pydocs is what is trained on \(pydocs\): give another"):
        corpora.open_corpus(base_run(dataset_name="pydocs", validation_dataset="pydocs"))


def test_conversations_are_held_out_and_dropped_from_training(tmp_path: Path) -> None:
    chats = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(20)]
    run = InstructRun(
        dataset_name=lines(tmp_path / "chats.jsonl", chats),
        validation_dataset=lines(tmp_path / "held.jsonl", [chats[3], {"question": "New?", "answer": "Yes."}]),
    )
    data = load_instruct_data(run, tokenizer(), CONTEXT)
    assert [len(data.prompts), data.provenance.sizes["validation"].documents] == [2, 2]
    assert data.provenance.sizes["train"].documents == 19
    assert f"1 left out, held out by validation_dataset: row 3 of {tmp_path / 'chats.jsonl'}" in data.description
    assert {prompt[0]["content"] for prompt in data.prompts} == {"Say 3", "New?"}


def test_pairs_are_held_out_by_their_prompts(tmp_path: Path) -> None:
    pairs = [{"prompt": f"Say {number}", "chosen": "yes", "rejected": "no"} for number in range(10)]
    held = {"prompt": "Say 3", "chosen": "three", "rejected": "four"}
    run = PreferenceRun(
        dataset_name=lines(tmp_path / "pairs.jsonl", pairs), validation_dataset=lines(tmp_path / "held.jsonl", [held])
    )
    data = load_preference_data(run, tokenizer(), CONTEXT)
    assert len(data.rows) == 9 and len(data.validation) == 1
    assert "held out by validation_dataset: row 3" in data.description


def test_of_a_data_set_on_the_hub_its_own_validation_split_is_held_out() -> None:
    assert validation_split("user/name", ["train", "test", "validation"]) == "validation"
    assert validation_split("user/name", ["train"]) == "train"
    with pytest.raises(UserError, match="no split validation or test, only train, extra"):
        validation_split("user/name", ["train", "extra"])
