"""Loading: all of a model's weights, or one line that says what is wrong with its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from fgpt_hf.config.runs import DEFAULT_CONTEXT
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import context_length, load_fgpt, load_model, load_tokenizer, save_model
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from tests.support.tiny import CONTEXT, random_model, save, tokenizer

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def damaged(folder: Path, **config: int) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(content | config), encoding="utf-8")
    if not config:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize("loader", [load_model, load_fgpt])
@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "weights of .* are damaged: .*"),
        ({"num_hidden_layers": 3}, r"lacks \d+ of its weights, such as model\.layers\.2\..*"),
        ({"hidden_size": 64}, "weights of .* do not have the shape in its config: model.*"),
    ],
)
def test_weights_that_are_not_all_there_are_not_made_up(loader: Any, config: Any, problem: str, tmp_path: Path) -> None:
    folder = save(random_model(), tmp_path / "model")
    damaged(folder, **config)
    with pytest.raises(ValueError, match=problem):
        loader(str(folder))


@pytest.mark.parametrize("loader", [load_model, load_fgpt])
@pytest.mark.parametrize("content", ["{", None])
def test_a_tokenizer_that_cannot_be_read_is_named(loader: Any, content: str | None, tmp_path: Path) -> None:
    folder = save(random_model(), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if content:
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"the tokenizer of {folder} cannot be loaded"):
        loader(str(folder))


def test_the_context_length_is_the_models_else_the_tokenizers_else_2048() -> None:
    model = random_model(max_position_embeddings=48)
    assert context_length(model, tokenizer()) == 48
    model.config = AutoConfig.for_model("mamba")  # type: ignore[assignment]
    assert context_length(model, tokenizer()) == CONTEXT
    endless = tokenizer().__class__(vocab=tokenizer().get_vocab(), merges=[], model_max_length=10**30)
    assert context_length(model, endless) == DEFAULT_CONTEXT


def test_every_file_of_a_saved_model_can_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_model(random_model(), tokenizer(), tmp_path / "model")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert (tmp_path / "model" / "model.safetensors").is_file() and modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_one_line(value: float, tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    folder = save(model, tmp_path / "model")
    with pytest.raises(UserError, match=r"1 weights of .* hold NaN or infinite values, such as model\.layers\.1\.mlp"):
        load_fgpt(str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in TOKENIZER_FILES}


def test_a_tokenizer_that_was_loaded_and_used_is_saved_as_it_was_built(tmp_path: Path) -> None:
    build_tokenizer(CONTEXT).save_pretrained(tmp_path / "built")
    used = load_tokenizer(str(tmp_path / "built"))
    used(["one", "more than one"], padding=True, truncation=True, max_length=2)
    save_model(random_model(), used, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "built")
    assert contents(tmp_path / "model").keys() == TOKENIZER_FILES
    again = load_tokenizer(str(tmp_path / "model"))
    assert again(["one", "more than one"], padding=True)["input_ids"][0][0] == again.pad_token_id


def test_tokens_that_a_user_added_are_saved(tmp_path: Path) -> None:
    own = build_tokenizer(CONTEXT)
    own.add_tokens(["<tool>"])
    save_model(random_model(), own, tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")).convert_tokens_to_ids("<tool>") == len(own) - 1
