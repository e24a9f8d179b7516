"""`fgpt tokenizer`: a vocabulary made for the documents, the same each time, with the project's control tokens."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fgpt_hf.cli.main import run
from fgpt_hf.config.runs import TokenizerTraining
from fgpt_hf.data import tokenizer_training
from fgpt_hf.data.tokenizer_training import train_tokenizer
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, build_tokenizer
from tests.support.fineweb import CARD, write_shards
from tests.support.forked import ROOT
from tests.support.loopback_hub import LoopbackHub, hub_environment

VOCABULARY = 320
ODD = ["", " ", "a\n\n  b", "naïve ☕ 日本語", "<|user|>\nHi<|end|>", "x" * 300, "tab\tand\x00null"]


def finnish(count: int, seed: int = 0) -> list[str]:
    """Texts of long inflected words, which GPT-2's vocabulary does not know."""
    source = random.Random(seed)
    stems, endings = ["järjestelmä", "ystävällinen", "yhteiskunta", "päivä"], ["", "ssä", "llä", "stä", "än", "kin"]
    words = [stem + ending for stem in stems for ending in endings]
    return [f"{index} " + " ".join(source.choices(words, k=40)) for index in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "finnish.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*finnish(200), "a\ud800b"]))
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path) -> tuple[Path, str]:
    folder = corpus.with_name("tokenizer")
    settings = TokenizerTraining(dataset_name=str(corpus), vocab_size=VOCABULARY, output_dir=str(folder))
    return folder, train_tokenizer(settings)


def test_the_folder_loads_with_every_byte_and_control_token_and_the_template(trained: tuple[Path, str]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(trained[0])
    last = list(range(VOCABULARY - len(CONTROL_TOKENS), VOCABULARY))
    assert len(tokenizer) == VOCABULARY and tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == last
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.chat_template == build_tokenizer().chat_template
    for text in ODD:
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert tokenizer.decode(ids) == text and not set(ids) & set(last)


def test_text_of_its_own_language_takes_fewer_tokens_than_with_gpt2(trained: tuple[Path, str]) -> None:
    folder, report = trained
    texts = finnish(20, seed=1)
    own, gpt2 = (
        sum(map(len, tokenizer(texts).input_ids))
        for tokenizer in (AutoTokenizer.from_pretrained(folder), build_tokenizer())
    )
    assert own < gpt2 / 2
    assert "% fewer tokens" in report and f"--tokenizer {folder}" in report
    found = float(report.partition("held out: ")[2].partition(",")[0])
    assert found == pytest.approx(sum(len(text.encode()) for text in texts) / own, rel=0.1)


def test_the_same_documents_give_the_same_files(corpus: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    run(["tokenizer", f"--dataset_name={corpus}", f"--vocab_size={VOCABULARY}", str(tmp_path / "again")])
    files = sorted(path.name for path in trained[0].iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((trained[0] / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    words = ["aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": f"{word} " * 50}) + "\n" for word in words))
    settings: dict[str, Any] = dict(dataset_name=str(path), vocab_size=400, validation_fraction=0.25)
    train_tokenizer(TokenizerTraining(**settings, output_dir=str(tmp_path / "tokenizer")))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert sorted(len(tokenizer.tokenize(word)) for word in words) == [1, 1, 1, 8]


def test_a_mixture_and_a_limit_of_characters(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "extra.txt").write_text("quokka " * 300)
    settings: dict[str, Any] = dict(dataset_name=f"{corpus}:20,{tmp_path / 'extra.txt'}", vocab_size=300)
    train_tokenizer(TokenizerTraining(**settings, output_dir=str(tmp_path / "all"), validation_fraction=0))
    assert "Ġquokka" in AutoTokenizer.from_pretrained(tmp_path / "all").get_vocab()
    report = train_tokenizer(
        TokenizerTraining(**settings, output_dir=str(tmp_path / "limited"), validation_fraction=0, max_characters=500)
    )
    characters = int(report.splitlines()[0].split()[-2].replace(",", ""))
    assert 500 <= characters < 1_200 and len(report.splitlines()) == 2


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_up_to_the_limit(hub_server: LoopbackHub, tmp_path: Path) -> None:
    files = write_shards(tmp_path / "corpus")
    other = {"data/CC-MAIN-2024-10/0.parquet": next(iter(files.values()))}  # of the configuration that the card names
    hub_server.add_repo("dataset", "HuggingFaceFW/fineweb-edu", {"README.md": CARD, **files, **other})
    limits = ["--vocab_size=280", "--max_characters=20000", "--validation_fraction=0.1"]
    command = [sys.executable, "-m", "fgpt_hf", "tokenizer", *limits, str(tmp_path / "tokenizer")]
    environment = hub_environment(hub_server, tmp_path, token=None)
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert "280 tokens, from 2" in done.stdout and "bytes held out" in done.stdout


def test_a_text_with_few_tokens_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "short.txt").write_text("to be or not to be " * 3)
    train_tokenizer(TokenizerTraining(dataset_name=str(tmp_path / "short.txt"), output_dir=str(tmp_path / "out")))
    (message,) = (record.getMessage() for record in caplog.records if "occur twice" in record.getMessage())
    assert str(len(AutoTokenizer.from_pretrained(tmp_path / "out"))) in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size=261", "OUT"], "vocab_size=261 has no room for the 256 bytes and 6 control tokens: give 262"),
        (["--vocab_size=0", "OUT"], "vocab_size=0 must be above zero"),
        (["EXISTING"], "EXISTING already exists: choose another name, or delete it"),
        (["--dataset_name=EMPTY", "OUT"], "no text in EMPTY"),
        (["--dataset_name=nowhere.txt", "OUT"], "nowhere.txt"),
        ([], "the following arguments are required: OUTPUT_DIR"),
        (["--vocab_sizes=9", "OUT"], "unknown argument '--vocab_sizes=9': did you mean --vocab_size?"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EXISTING").mkdir()
    Path("EXISTING/notes.txt").write_text("mine")
    Path("EMPTY").mkdir()
    Path("EMPTY/empty.txt").write_text("")
    with pytest.raises(UserError) as raised:
        run(["tokenizer", f"--dataset_name={corpus}", *arguments])
    assert message in str(raised.value) and not Path("OUT").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_training, "_Documents", lambda training: pytest.fail("the corpus was opened"))
    (tmp_path / "file.txt").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        run(["tokenizer", "--dataset_name=pydocs", str(tmp_path / "file.txt" / "OUT")])
