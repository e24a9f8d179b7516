"""FineWeb-Edu into training: streamed and prepared, through faults and kills, on one process and on two."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data import prepare, pretraining
from fgpt_hf.data.pretraining import load_pretraining_data
from fgpt_hf.data.shards import load_prepared
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines
from tests.support.fineweb import CARD, documents, write_shard, write_shards
from tests.support.loopback_hub import LoopbackHub, hub_environment

ROOT = Path(__file__).parents[2]
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pretraining, prepare):
        monkeypatch.setattr(module, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr("fgpt_hf.data.stream.BUFFER_CHARACTERS", 0)


@pytest.fixture
def run(tmp_path: Path) -> BaseRun:
    write_shards(tmp_path / "corpus", shards=4, texts=100)
    return BaseRun(
        dataset_name=str(tmp_path / "corpus" / "sample"),
        validation_fraction=0.1,
        max_position_embeddings=64,
        max_eval_rows=12,
        preprocessing_num_workers=1,
    )


def taken(run: BaseRun, times: int, rank: int = 0, processes: int = 1, count: int = 8) -> list[np.ndarray]:
    batches = load_pretraining_data(run).batches(rank, processes)
    return [batches.take(count)["input_ids"].numpy() for _ in range(times)]


def test_both_modes_hold_out_the_same_rows_whatever_the_seed(run: BaseRun) -> None:
    expected = load_pretraining_data(run).validation
    assert expected.shape == (12, 64)
    for other in (replace(run, seed=5), replace(run, streaming=False)):
        assert np.array_equal(load_pretraining_data(other).validation, expected)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_position_leads_back_and_two_processes_take_what_one_takes(
    run: BaseRun, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgpt_hf.data.stream.BLOCKS_PER_BUFFER", 2)  # so that shards are open where a buffer begins
    run = replace(run, streaming=streaming)
    expected = taken(run, times=28)
    halves = [taken(run, 28, rank, 2, count=4) for rank in (0, 1)]
    assert all(np.array_equal(np.concatenate(pair), one) for *pair, one in zip(*halves, expected, strict=True))
    batches = load_pretraining_data(run).batches(0, 1)
    for _ in range(20):
        batches.take(8)
    resumed = load_pretraining_data(run).batches(0, 1)
    torch.save(batches.state_dict(), tmp_path / "training.pt")  # as a checkpoint has it
    resumed.load_state_dict(torch.load(tmp_path / "training.pt", weights_only=True))
    assert all(np.array_equal(resumed.take(8)["input_ids"].numpy(), rows) for rows in expected[20:])


def test_rows_are_made_once_and_then_found(run: BaseRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for streaming in (True, False):
        first = load_pretraining_data(replace(run, streaming=streaming))
        with monkeypatch.context() as patch:
            patch.delattr(prepare, "prepare")
            patch.delattr(pretraining, "validation_rows")
            again = load_pretraining_data(replace(run, streaming=streaming))
        assert np.array_equal(again.validation, first.validation)


def test_documents_that_have_changed_are_prepared_anew_and_end_a_stream(run: BaseRun) -> None:
    streamed = load_pretraining_data(run).batches(0, 1)
    prepared = load_pretraining_data(replace(run, streaming=False)).batches(0, 1)
    write_shard(Path(run.dataset_name) / "10BT" / "new.parquet", documents(90, seed=9))
    with pytest.raises(ValueError, match="has changed since the checkpoint.*restore its files as they were"):
        batches = load_pretraining_data(run).batches(0, 1)
        batches.load_state_dict(streamed.state_dict())
        batches.take(1)
    with pytest.raises(ValueError, match="the training rows are not those of the checkpoint"):
        load_pretraining_data(replace(run, streaming=False)).batches(0, 1).load_state_dict(prepared.state_dict())


@pytest.mark.parametrize("streaming", [True, False])
def test_the_content_of_the_documents_decides_whether_a_run_goes_on(tmp_path: Path, streaming: bool) -> None:
    texts = documents(90)
    file = tmp_path / "a.txt"
    file.write_text("\n<|endoftext|>\n".join(texts))
    run = BaseRun(
        dataset_name=str(file),
        validation_fraction=0.1,
        max_position_embeddings=64,
        preprocessing_num_workers=1,
        streaming=streaming,
    )
    batches = load_pretraining_data(run).batches(0, 1)
    batches.take(3)
    state, expected = batches.state_dict(), batches.take(5)["input_ids"]

    file.write_text("\n<|endoftext|>\n".join(texts))
    os.utime(file, (1, 1))
    resumed = load_pretraining_data(run).batches(0, 1)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.take(5)["input_ids"], expected)

    file.write_text(
        "\n<|endoftext|>\n".join([*texts[:50], texts[50].upper(), *texts[51:]])
    )  # as many bytes and documents
    os.utime(file, (1, 1))
    resumed = load_pretraining_data(run).batches(0, 1)
    with pytest.raises(UserError, match="changed.*restore"):
        resumed.load_state_dict(state)
        resumed.take(1)


@pytest.mark.parametrize("position", [0, 70, 100, 0.5, -1])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_cache_of_validation_rows_is_made_again(
    run: BaseRun, tmp_path: Path, damage: str, position: float
) -> None:
    expected = load_pretraining_data(run).validation
    (cache,) = tmp_path.glob("hf_home/fgpt/validation/*.array")
    content = bytearray(cache.read_bytes())
    index = int(position * len(content)) if position == 0.5 else int(position)
    content[index] ^= 1
    cache.write_bytes({"flip": bytes(content), "truncate": content[:index], "empty": b""}[damage])
    assert np.array_equal(load_pretraining_data(run).validation, expected)
    assert np.array_equal(load_pretraining_data(run).validation, expected)


def test_damaged_rows_in_the_cache_are_prepared_again(
    run: BaseRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = replace(run, streaming=False)
    expected = taken(run, times=3)
    (rows,) = tmp_path.glob("hf_home/fgpt/prepared/*/shard-00000/train.arrow")
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    assert all(map(np.array_equal, taken(run, times=3), expected))
    assert f"{rows} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda rows: rows, None),
        (lambda rows: {"train": rows["train"]}, "the split validation of tester/rows is damaged"),
        (lambda rows: rows | {"train": rows["train"].select(range(5))}, "the split train of tester/rows is damaged"),
        (lambda rows: rows | {"train": rows["train"].rename_column("input_ids", "ids")}, "the split train of"),
        (lambda rows: {"train": rows["validation"], "validation": rows["train"]}, "the split train of tester/rows is"),
    ],
    ids=["whole", "no validation", "fewer rows", "another column", "exchanged"],
)
def test_rows_from_the_hub_are_all_there_or_it_is_said(
    run: BaseRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], Any], reason: str | None
) -> None:
    folder = tmp_path / "rows"
    prepare.prepare(run, folder)
    prepared = load_prepared(folder, run.max_position_embeddings).rows
    rows = damage({split: data.dataset.with_format(None) for split, data in prepared.items()})
    monkeypatch.setattr(pretraining, "_is_prepared_on_hub", lambda run: True)
    monkeypatch.setattr(pretraining, "hf_hub_download", lambda *_, **__: str(folder / "prepared.json"))
    monkeypatch.setattr(pretraining, "load_dataset", lambda *_, **__: rows)
    on_hub = replace(run, dataset_name="tester/rows")
    if reason is not None:
        with pytest.raises(UserError, match=reason):
            load_pretraining_data(on_hub)
        return
    state = load_pretraining_data(replace(run, dataset_name=str(folder))).batches(0, 1).state_dict()
    load_pretraining_data(on_hub).batches(0, 1).load_state_dict(state)  # the same rows, wherever they are


# Whole journeys: real clients in child processes, a Hub on this machine.


class Journey:
    """Commands in a folder of their own, where `server` is the Hub."""

    def __init__(self, server: LoopbackHub, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.environment = hub_environment(server, folder) | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",  # seconds of silence
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *command],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def go(self, *command: str) -> str:
        process = self.start(*command)
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        return output

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The losses of a run by step; without what depends on the clock."""
        lines = read_json_lines(self.folder / name / "metrics.jsonl")
        return [{key: line[key] for key in ("step", "loss", "eval_loss") if key in line} for line in lines]


@pytest.fixture
def journey(tmp_path: Path) -> Iterator[Journey]:
    with LoopbackHub() as server:
        shards = write_shards(tmp_path / "shards", shards=5, texts=120)
        dump = {"data/CC-MAIN-2024-10/000.parquet": write_shard(tmp_path / "dump.parquet", documents(9, seed=99))}
        server.add_repo("dataset", FINEWEB_EDU, {"README.md": CARD, **shards, **dump})
        yield Journey(server, tmp_path)


def training(name: str, **settings: object) -> list[str]:
    """The command line of a very small run."""
    flags = {
        "preset": "quickstart",
        "output_dir": name,
        "dataset_name": "fineweb-edu",
        "streaming": True,
        "preprocessing_num_workers": 1,
        "validation_fraction": 0.1,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "warmup_steps": 1,
        "logging_steps": 1,
        "eval_steps": 12,
        "save_steps": 4,
        "max_eval_rows": 8,
        "sample_steps": 100,
        "eval_tasks": "",
        "bf16": False,
    }
    return [str(ROOT / "train_base.py"), *(f"--{key}={value}" for key, value in (flags | settings).items())]


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_streamed_run_survives_faults_and_kills_on_one_process_and_on_two(journey: Journey) -> None:
    journey.go(*training("undisturbed"))
    expected = journey.metrics("undisturbed")
    assert len(expected) == 25

    shard = rf"{FINEWEB_EDU}/resolve/.*\.parquet"
    journey.server.fail("GET", shard, status=503)
    journey.server.fail("GET", shard, truncate_to=300)
    journey.server.fail("GET", shard, delay=3)
    journey.server.fail("GET", shard, drop_after=200)
    process = journey.start(*training("killed"))
    until(lambda: len(journey.metrics("killed")) > 9)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    resume = training("killed", resume_from_checkpoint="latest", per_device_train_batch_size=4)
    journey.go(*two, *resume)
    found = journey.metrics("killed")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, another in zip(found, expected, strict=True):
        assert one == pytest.approx(another, abs=2e-5)  # two processes add up in another order


@pytest.mark.slow
def test_rows_prepared_from_the_hub_train_from_their_folder_and_from_the_hub(journey: Journey) -> None:
    journey.server.fail("POST", r"/commit/", status=503)
    output = journey.go(
        "-c",
        "import sys; sys.argv[0] = 'fgpt'; from fgpt_hf.cli.main import main; main()",
        "prepare",
        *("--dataset_name=fineweb-edu", "--dataset_config_name=sample-10BT", "--preprocessing_num_workers=1"),
        *(
            "--validation_fraction=0.1",
            "--max_position_embeddings=64",
            "--output_dir=rows",
            "--hub_dataset_id=tester/rows",
        ),
    )
    assert "rows of 64: none lost" in output and "train on them with --dataset_name tester/rows" in output
    for name in ("rows", "tester/rows"):
        journey.go(*training(f"from-{name.replace('/', '-')}", dataset_name=name))
    assert len(journey.metrics("from-rows")) == 25
    assert journey.metrics("from-rows") == journey.metrics("from-tester-rows")
