"""Conversions: complete folders that compute what their source computes, and plain errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fgpt_hf.cli import main
from fgpt_hf.convert.convert import convert
from fgpt_hf.convert.export import export
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import load_fgpt, load_tokenizer
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TEXT_ID, PAD_ID, has_control_tokens
from tests.convert.models import CHATML, CONTEXT, QUESTION, TEXTS, refusal, write_gpt2_with, write_small_model
from tests.convert.test_layouts import checkpoint, restated

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    return write_small_model(tmp_path_factory.mktemp("models") / "fgpt")


def full_vocabulary(layout: str, size: int) -> dict[str, torch.Tensor]:
    """A checkpoint of this layout with as many tokens as a real one."""
    embeddings = 0.2 * torch.randn(size, 48, generator=torch.Generator().manual_seed(2))
    return checkpoint(layout) | {"transformer.wte.weight": embeddings, "lm_head.weight": embeddings}


@pytest.mark.parametrize("layout", ["original-2025", "original-2026"])
def test_the_originals_weights_become_a_folder_that_chats_as_they_were_trained(layout: str, tmp_path: Path) -> None:
    state = full_vocabulary(layout, 50259)
    torch.save({"model_state_dict": state, "step": 5000}, tmp_path / "weights.pth")
    assert convert(str(tmp_path / "weights.pth"), tmp_path / "model")[0] == layout
    model, tokenizer = load_fgpt(str(tmp_path / "model"))
    assert (model.config.vocab_size, model.config.num_attention_heads, model.config.hidden_act) == (50304, 24, "gelu")
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    ids = inputs["input_ids"]
    assert (
        (ids[0, 0], ids[0, -1])
        == (50257, 50258)
        == tuple(CONTROL_TOKENS[f"<|{who}|>"] for who in ("user", "assistant"))
    )
    torch.testing.assert_close(model(ids).logits[..., :50259], restated(state, ids).float(), rtol=0, atol=1e-5)
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for _ in range(8):
        ids = torch.cat([ids, restated(state, ids)[:, -1:].argmax(-1)], dim=1)  # type: ignore[list-item]
    assert torch.equal(written, ids)
    assert model.generation_config.eos_token_id == END_OF_TEXT_ID


def test_nanogpts_checkpoint_becomes_a_folder_with_its_own_heads(tmp_path: Path) -> None:
    state = full_vocabulary("nanogpt", 50304)
    arguments = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 32, "bias": True, "vocab_size": 50304}
    torch.save(
        {"model": state, "model_args": arguments, "iter_num": 9, "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt"
    )
    layout, _ = convert(str(tmp_path / "ckpt.pt"), tmp_path / "model")
    model, tokenizer = load_fgpt(str(tmp_path / "model"))
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    assert (layout, tokenizer.model_max_length) == ("nanogpt", 32)
    torch.testing.assert_close(model(ids).logits, restated(state, ids, heads=3).float(), rtol=0, atol=1e-5)


def test_gpt2s_vocabulary_grows_to_hold_the_control_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=3, n_positions=CONTEXT)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    convert(str(tmp_path / "gpt2"), tmp_path / "model")
    convert(str(tmp_path / "gpt2"), tmp_path / "larger", vocab_size=50432)
    (ours, tokenizer), (larger, _) = load_fgpt(str(tmp_path / "model")), load_fgpt(str(tmp_path / "larger"))
    assert (theirs.config.vocab_size, ours.config.vocab_size, larger.config.vocab_size) == (50257, 50304, 50432)
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    for model in (ours, larger):
        torch.testing.assert_close(model(ids).logits[..., :50257], theirs(ids).logits, rtol=0, atol=1e-5)
        assert (model(ids).logits.argmax(-1) < 50257).all()


def test_the_command_line_converts_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_checkpoint(tmp_path / "weights.pth", full_vocabulary("original-2025", 50304))
    main.run(["convert", str(source), str(tmp_path / "model"), "--num_attention_heads", "6"])
    assert "original-2025" in capsys.readouterr().out
    main.run(["export", str(tmp_path / "model"), str(tmp_path / "gpt2"), "--format", "gpt2"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").config.n_head == 6


# A source's own tokens


def test_a_chat_models_own_tokens_template_and_ends_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fgpt_hf")
    source = write_gpt2_with(tmp_path / "chatml", ["<|im_start|>", "<|im_end|>"], CHATML)
    convert(str(source), tmp_path / "model")
    assert "keeps its own tokenizer (<|im_start|>, <|im_end|>): without FGPT's control tokens" in caplog.text
    (model, tokenizer), theirs = load_fgpt(str(tmp_path / "model")), GPT2LMHeadModel.from_pretrained(source)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [50257, 50258]
    assert tokenizer.chat_template == CHATML and model.config.vocab_size == 50259
    assert model.generation_config.eos_token_id == [END_OF_TEXT_ID, 50258]
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.7)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    assert inputs["input_ids"][0, 0] == 50257
    written = [each.generate(**inputs, max_new_tokens=8, do_sample=False) for each in (model, theirs)]
    assert torch.equal(*written)

    export(str(tmp_path / "model"), tmp_path / "again", "gpt2")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(
    ("tokens", "template"), [(["[PAD]"], None), ([], "{{ messages[0]['content'] }}"), (["<|user|>", "<|pad|>"], None)]
)
def test_any_token_or_template_of_its_own_is_kept(tokens: list[str], template: str | None, tmp_path: Path) -> None:
    source = write_gpt2_with(tmp_path / "gpt2", tokens, template)
    convert(str(source), tmp_path / "model")
    _, tokenizer = load_fgpt(str(tmp_path / "model"))
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert tokenizer.chat_template == template and len(tokenizer) == 50257 + len(tokens)


def test_a_gpt2_that_splits_text_in_another_way_keeps_doing_so(tmp_path: Path) -> None:
    source = write_gpt2_with(tmp_path / "gpt2", [])
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (source / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    expected = load_tokenizer(str(source)).encode("Hello")
    convert(str(source), tmp_path / "model")
    assert load_fgpt(str(tmp_path / "model"))[1].encode("Hello") == expected == [18435]


def test_a_plain_gpt2_keeps_its_generation_config_and_gets_fgpts_tokenizer(tmp_path: Path) -> None:
    convert(str(write_gpt2_with(tmp_path / "gpt2", [])), tmp_path / "model")
    model, tokenizer = load_fgpt(str(tmp_path / "model"))
    assert has_control_tokens(tokenizer) and model.config.vocab_size == 50304
    assert (model.generation_config.temperature, model.generation_config.pad_token_id) == (0.7, PAD_ID)


def test_tokens_without_weights_are_refused_by_name(tmp_path: Path) -> None:
    source = write_gpt2_with(tmp_path / "gpt2", ["<|im_start|>", "<|im_end|>"], CHATML, rows=50257)
    with pytest.raises(
        UserError, match=r"no weights for '<\|im_end\|>': its tokenizer's id is 50258, and the weights ha"
    ):
        convert(str(source), tmp_path / "model")


def test_a_vocabulary_may_grow_but_not_shrink_below_its_own_tokens(tmp_path: Path) -> None:
    source = write_gpt2_with(tmp_path / "gpt2", ["[PAD]"])
    assert convert(str(source), tmp_path / "model", vocab_size=50304).model.config.vocab_size == 50304
    with pytest.raises(UserError, match="vocab_size=50257 is too small: the tokenizer has 50258 tokens"):
        convert(str(source), tmp_path / "small", vocab_size=50257)


def test_a_damaged_tokenizer_is_not_taken_for_gpt2s(tmp_path: Path) -> None:
    source = write_gpt2_with(tmp_path / "gpt2", ["[PAD]"])
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer of .* cannot be loaded"):
        convert(str(source), tmp_path / "model")


def test_a_generation_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    source = write_gpt2_with(tmp_path / "gpt2", [])
    (source / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    with pytest.raises(UserError, match=r"generation_config\.json cannot be kept: "):
        convert(str(source), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Bad input


def save_checkpoint(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


class Trap:
    """A pickle that would leave a file behind if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_is_not_weights_is_refused_without_being_executed(writer: Any, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    writer({"model": Trap(trace)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth: it .* pickle .* not executed|weights.pth: it cannot be read"):
        convert(str(tmp_path / "weights.pth"), tmp_path / "model")
    assert not trace.exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot be read as a PyTorch checkpoint"),
        (b"PK\x03\x04 not a zip", "cannot be read as a PyTorch checkpoint|was not executed"),
        (b"not a pickle", "cannot be read as a PyTorch checkpoint|was not executed"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        convert(str(tmp_path / "weights.pth"), tmp_path / "model")


def test_a_tensor_alone_and_an_unknown_layout_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="alone.pth: it holds a Tensor, not weights by name"):
        convert(str(save_checkpoint(tmp_path / "alone.pth", torch.ones(3))), tmp_path / "model")
    other = save_checkpoint(tmp_path / "other.pth", {"conv.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"other.pth: unknown layout: expected transformer.h.N.* found conv.weight"):
        convert(str(other), tmp_path / "model")


@pytest.mark.parametrize(
    ("tokens", "options", "problem"),
    [
        (65, {}, "vocabulary of 65, too small for GPT-2's 50257 tokens"),
        (50259, {"vocab_size": 50260}, "vocab_size=50260 is too small: the tokenizer has 50262 tokens"),
        (50304, {"vocab_size": 50262}, "vocab_size=50262 is too small: the weights have 50304 tokens"),
        (50259, {"num_attention_heads": 5}, "hidden_size=48 must divide evenly among num_attention_heads=5"),
    ],
)
def test_vocabularies_and_heads_that_do_not_fit_are_refused(
    tokens: Any, options: Any, problem: Any, tmp_path: Path
) -> None:
    source = save_checkpoint(tmp_path / "weights.pth", full_vocabulary("original-2026", tokens))
    with pytest.raises(UserError, match=problem):
        convert(str(source), tmp_path / "model", **options)


def test_another_tokenizer_than_gpt2s_is_refused(folder: Path, tmp_path: Path) -> None:
    export(str(folder), tmp_path / "gpt2", "gpt2")
    tokenizer = json.loads((tmp_path / "gpt2" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["The"] = vocabulary["The"], vocabulary["the"]
    (tmp_path / "gpt2" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has another tokenizer than GPT-2's: they differ in 2 tokens"):
        convert(str(tmp_path / "gpt2"), tmp_path / "model")


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    GPTNeoXConfig().save_pretrained(tmp_path / "neox")
    (tmp_path / "neox" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="type 'gpt_neox': convert reads folders of type gpt2, llama, qwen3, arcee, "):
        convert(str(tmp_path / "neox"), tmp_path / "model")


def test_a_qwen3_with_gpt2s_tokens_becomes_fgpt_with_equal_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(qwen3_config()).eval()
    theirs.save_pretrained(tmp_path / "qwen3")
    layout, ours = convert(str(tmp_path / "qwen3"), tmp_path / "model")
    assert (layout, ours.config.vocab_size, ours.config.mlp) == ("qwen3", 50304, "gated")
    loaded, tokenizer = load_fgpt(str(tmp_path / "model"))
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded(ids).logits[..., :50257], theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "layer_types=.* is a feature that"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
    ],
)
def test_what_fgpt_lacks_is_named_by_its_field(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    Qwen3ForCausalLM(qwen3_config(**changes)).save_pretrained(tmp_path / "qwen3")
    with pytest.raises(UserError, match=f"qwen3: {problem}"):
        convert(str(tmp_path / "qwen3"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def qwen3_config(**changes: Any) -> Qwen3Config:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": 50257, "bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    size = {"intermediate_size": 64, "head_dim": 24, "max_position_embeddings": CONTEXT, "initializer_range": 0.2}
    return Qwen3Config(**shape | tokens | size | changes)


@pytest.mark.parametrize(
    ("name", "weight", "problem"),
    [
        ("transformer.wte.weight", torch.ones(3), "transformer.wte.weight should be a matrix"),
        ("transformer.h.0.mlp.c_fc.weight", torch.ones(3, 48), "should be .* and is"),
        ("transformer.h.1.attn.attn.out_proj.weight", torch.ones(3, 48), "cannot be multiplied"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(
    name: str, weight: torch.Tensor, problem: str, tmp_path: Path
) -> None:
    state = full_vocabulary("original-2025", 50304) | {name: weight}
    source = save_checkpoint(tmp_path / "weights.pth", state)
    with pytest.raises(UserError, match=f"weights.pth: the weights do not fit together: .*{problem}"):
        convert(str(source), tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{empty}/none.pth", "{new}"], "or the id of a model on the Hub"),
        (["{model}", "{model}"], "already exists"),
        (["{model}", "{new}"], "holds a model of type 'fgpt': convert reads folders of type gpt2, llama, qwen3"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    arguments: list[str],
    problem: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    paths = {"model": folder, "empty": tmp_path / "empty", "new": tmp_path / "new"}
    arguments = [argument.format(**paths) for argument in arguments]
    assert problem in refusal(["convert", *arguments], monkeypatch, capsys)
    assert not (tmp_path / "new").exists()
