"""A run with a tokenizer of its own, through everything that reads its folder."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fgpt_hf.chat import ChatSession, load_for_chat
from fgpt_hf.cli.main import run
from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.shards import load_prepared
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines
from fgpt_hf.model.io import load_fgpt
from fgpt_hf.model.run_tokenizer import vocabulary_of
from fgpt_hf.tokenizer.document_encoder import DocumentEncoder
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS
from fgpt_hf.training.start_model import unseen_role_tokens
from tests.support.any_models import any_tokenizer, write_chats
from tests.support.forked import run_command
from tests.support.loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow

VOCABULARY = 300
ROWS = 320  # the next multiple of 64 that leaves eight unused
TINY = [
    *("--preset=quickstart", "--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--eval_tasks="),
    *("--max_position_embeddings=64", "--warmup_steps=2", "--learning_rate=0.01", "--max_eval_rows=8"),
]


def train(*flags: object, script: str = "train_base.py") -> subprocess.CompletedProcess[str]:
    return run_command(script, *TINY[:1], *(TINY[1:] if script == "train_base.py" else ()), *flags)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    lines = [{"text": f"Document {n} says that {n} and {n + 1} make {2 * n + 1}. " * (1 + n % 7)} for n in range(300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tokenizer(documents: Path) -> Path:
    folder = documents.with_name("tokenizer")
    run(["tokenizer", f"--dataset_name={documents}", f"--vocab_size={VOCABULARY}", str(folder)])
    return folder


@pytest.fixture(scope="module")
def base(documents: Path, tokenizer: Path) -> Path:
    folder = documents.with_name("base")
    given = [f"--dataset_name={documents}", f"--tokenizer={tokenizer}", f"--output_dir={folder}", "--save_steps=4"]
    done = train(*given, "--max_steps=8")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_run_has_rows_embeddings_and_ends_of_its_vocabulary(base: Path, tokenizer: Path) -> None:
    model, found = load_fgpt(str(base))
    last = dict(zip(CONTROL_TOKENS, range(VOCABULARY - len(CONTROL_TOKENS), VOCABULARY), strict=True))
    assert model.config.vocab_size == ROWS and found.get_vocab() == AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    assert model.generation_config.eos_token_id == [last["<|endoftext|>"], last["<|end|>"]]
    assert model.generation_config.pad_token_id == model.config.pad_token_id == last["<|pad|>"]
    assert found.model_max_length == 64
    measured = [line for line in read_json_lines(base / "metrics.jsonl") if "eval_loss" in line]
    assert measured[0]["eval_loss"] == pytest.approx(np.log(ROWS), rel=0.02)
    assert measured[-1]["eval_bits_per_byte"] < measured[0]["eval_bits_per_byte"] - 0.3
    assert yaml.safe_load((base / "run.yaml").read_text())["tokenizer"] == str(tokenizer)


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_it_goes_on_bit_for_bit_and_only_with_the_same_tokenizer(
    documents: Path, tokenizer: Path, base: Path, tmp_path: Path, streaming: str
) -> None:
    own = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    given = [f"--dataset_name={documents}", f"--tokenizer={own}", f"--streaming={streaming}", "--max_steps=8"]
    given += ["--save_steps=4", "--save_total_limit=2", f"--output_dir={tmp_path / 'run'}"]
    assert (done := train(*given)).returncode == 0, done.stderr
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    again = [*given, f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoints' / 'step_00000004'}"]
    assert (done := train(*again)).returncode == 0, done.stderr
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all((found[name] == expected[name]).all() for name in expected)

    rules = json.loads((own / "tokenizer.json").read_text())
    first, second = rules["model"]["merges"][-1], rules["model"]["merges"][-2]
    vocabulary = rules["model"]["vocab"]
    one, other = "".join(first), "".join(second)
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    rules["model"]["merges"][-2:] = [first, second]
    (own / "tokenizer.json").write_text(json.dumps(rules))
    done = train(*again)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the tokenizer has changed" in done.stderr or "how they are made into rows, have changed" in done.stderr


def test_it_chats_and_is_evaluated(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = ChatSession(*load_for_chat(str(base / "model")), {"do_sample": False}, max_new_tokens=4)
    written: list[str] = []
    assert session.answer("Document 7", written.append).text == "".join(written)
    text = tmp_path / "held_out.txt"
    text.write_text("Document 7 says that 7 and 8 make 15. " * 20)
    run(["evaluate", str(base / "model"), "--tasks", f"pydocs-validation={text}"])
    assert "bits_per_byte" in capsys.readouterr().out


def test_it_is_tuned_to_answer_with_its_own_control_tokens(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    chats, folder = write_chats(tmp_path / "chats.jsonl"), tmp_path / "instruct"
    given = [f"--model_name_or_path={base}", f"--dataset_name={chats}", f"--output_dir={folder}", "--max_new_tokens=8"]
    short = ["--max_steps=30", "--warmup_steps=1", "--learning_rate=0.03", "--per_device_train_batch_size=8"]
    quiet = ["--eval_steps=30", "--sample_steps=99", "--save_steps=99", "--validation_prompts=1"]
    done = train(*given, *short, *quiet, script="train_instruct.py")
    assert done.returncode == 0, done.stderr
    assert f"never seen by {base}, so they start from the mean of all embeddings" in done.stdout + done.stderr
    model, found = load_fgpt(str(folder))
    assert found.get_vocab() == AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    assert model.config.vocab_size == ROWS
    assert unseen_role_tokens(model, found) == ["<|system|>"]  # the conversations have no such message
    losses = [line["eval_loss"] for line in read_json_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0] - 1


def test_it_is_published_and_loaded_by_its_name(base: Path, server: LoopbackHub) -> None:
    run(["publish", str(base), "tester/own", "--license=mit"])
    model, found = load_fgpt("tester/own")
    expected, tokenizer = load_fgpt(str(base))
    assert found.get_vocab() == tokenizer.get_vocab() and found.chat_template == tokenizer.chat_template
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in expected.named_parameters())


def test_a_tokenizer_is_named_by_its_id_on_the_hub(
    documents: Path, tokenizer: Path, server: LoopbackHub, tmp_path: Path
) -> None:
    server.add_repo("model", "tester/words", files=tokenizer)
    source = [f"--dataset_name={documents}", "--max_position_embeddings=64"]
    run(["prepare", *source, "--tokenizer=tester/words", f"--output_dir={tmp_path / 'rows'}"])
    encoder = DocumentEncoder.of(AutoTokenizer.from_pretrained(tokenizer))
    assert len(load_prepared(tmp_path / "rows", 64, encoder=encoder).rows["train"]), "named by content, not by place"
    with pytest.raises(UserError, match="no tokenizer 'tester/nothing'"):
        run(["prepare", *source, "--tokenizer=tester/nothing", f"--output_dir={tmp_path / 'none'}"])
    assert not (tmp_path / "none").exists()


def test_more_than_65536_tokens_have_rows_of_32_bits(documents: Path, tmp_path: Path) -> None:
    any_tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    given = [f"--dataset_name={documents}", f"--tokenizer={tmp_path / 'tokenizer'}", "--max_steps=2"]
    done = train(*given, "--streaming=false", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    model, found = load_fgpt(str(tmp_path / "run"))
    assert model.config.eos_token_id == found.eos_token_id > 1 << 16 and model.config.vocab_size % 64 == 0
    measured = [
        line["eval_loss"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line
    ]
    assert measured[0] == pytest.approx(np.log(model.config.vocab_size), rel=0.02)


def test_it_is_exported_as_gguf_with_its_own_vocabulary(base: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    run(["export", str(base), str(tmp_path / "model.gguf"), "--format", "gguf"])
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == ROWS
    assert int(fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == VOCABULARY - len(CONTROL_TOKENS)


def test_prepared_rows_name_their_tokenizer(documents: Path, tokenizer: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    source = [f"--dataset_name={documents}", "--max_position_embeddings=64", f"--output_dir={rows}"]
    run(["prepare", *source, f"--tokenizer={tokenizer}"])
    flags = [f"--dataset_name={rows}", f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]
    done = train(*flags)
    assert done.returncode == 2 and "tokenizer" in done.stderr.splitlines()[-1]
    assert (done := train(*flags, f"--tokenizer={tokenizer}")).returncode == 0, done.stderr


def test_the_estimate_counts_its_embeddings(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--preset=quickstart-modern", "--device=h100"]
    run(["estimate", *shape])
    default = capsys.readouterr().out
    run(["estimate", *shape, f"--tokenizer={tokenizer}"])
    own = capsys.readouterr().out
    found = [int(text.partition(" parameters")[0].split()[-1].replace(",", "")) for text in (default, own)]
    assert found[0] - found[1] == (50304 - ROWS) * 256


def test_a_vocabulary_of_a_multiple_of_64_leaves_rows_that_no_text_has(documents: Path) -> None:
    folder = documents.with_name("tokenizer-320")
    run(["tokenizer", f"--dataset_name={documents}", "--vocab_size=320", str(folder)])
    assert vocabulary_of(TextSource(tokenizer=str(folder)))["vocab_size"] == 384


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer 'TOKENIZER'"),
        ({}, "no tokenizer 'TOKENIZER'"),
        ({"eos_token": None, "bos_token": None}, "has no end of text"),
    ],
)
def test_a_tokenizer_that_does_not_work_is_one_line(
    documents: Path, tokenizer: Path, tmp_path: Path, content: dict[str, None] | None, message: str
) -> None:
    folder = tmp_path / "tokenizer"
    if content == {}:
        folder.mkdir()
    elif content is not None:
        shutil.copytree(tokenizer, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **content, "unk_token": None}))
    done = train(f"--dataset_name={documents}", f"--tokenizer={folder}", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert message.replace("TOKENIZER", str(folder)) in done.stderr
    assert not (tmp_path / "run").exists()
