"""Loading: all of a model's weights, or one line that says what is wrong with its files."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fgpt_hf.model.io import DEFAULT_CONTEXT, context_length, load_fgpt, load_model, save_model
from tests.support.tiny import CONTEXT, random_model, save, tokenizer


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
