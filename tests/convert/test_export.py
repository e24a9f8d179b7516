"""Exports: the same text in every program, and plain errors."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerBase

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.cli import main
from fgpt_hf.config.presets import MODERN_BLOCKS, PRESETS
from fgpt_hf.convert.convert import convert
from fgpt_hf.convert.export import export
from fgpt_hf.convert.stock import STOCK_CLASSES, fitting_class, from_stock, network_with, to_stock
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import load_fgpt
from fgpt_hf.runtime.network import count_parameters, network_config
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, END_OF_TURN_ID
from tests.convert.models import CHATML, CONTEXT, QUESTION, TEXTS, refusal, write_gpt2_with, write_small_model
from tests.support.tiny import random_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    return write_small_model(tmp_path_factory.mktemp("models") / "fgpt")


def greedy(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, new_tokens: int = 16) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])  # type: ignore[return-value]


def llama_cpp(file: Path) -> Any:
    """A llama.cpp server with a model."""
    xllamacpp = pytest.importorskip("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(file), CONTEXT, 1, False
    options.cpuparams.n_threads = 1
    return xllamacpp.Server(options)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"position_embedding": "rope"}, "position_embedding='rope' (it needs 'learned')"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 (it needs 2)"),
        ({"head_dim": 8}, "head_dim=8 (it needs 16)"),
        ({"final_logit_softcapping": 15.0, "qk_norm": True}, "qk_norm=True (it needs False), final_logit_softcapping="),
    ],
)
def test_blocks_that_gpt2_lacks_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"GPT2LMHeadModel lacks {field}")):
        to_stock(random_model(**changes), "gpt2")
    with pytest.raises(UserError, match=re.escape(f"the nearest, GPT2LMHeadModel lacks {field}")):
        to_stock(random_model(**changes))


ROTARY = {"position_embedding": "rope", "norm": "rmsnorm"}
GATED = {**ROTARY, "mlp": "gated", "hidden_act": "silu"}
NANOCHAT = {
    **ROTARY,
    **{"hidden_act": "relu2", "norm_elementwise_affine": False, "embedding_norm": True, "qk_norm": True},
    **{"mlp_bias": False, "attention_bias": False},
}
LONGER = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", GATED),
        ("llama", {**GATED, "attention_bias": False, "mlp_bias": False, "num_key_value_heads": 1, "head_dim": 8}),
        ("llama", {**GATED, "norm_elementwise_affine": False, "rope_parameters": LONGER}),
        ("qwen3", {**GATED, "mlp_bias": False, "qk_norm": True, "head_dim": 20, "tie_word_embeddings": False}),
        ("qwen3", {**GATED, "mlp_bias": False, "qk_norm": True, "hidden_act": "relu2", "num_key_value_heads": 1}),
        ("qwen3", dict(MODERN_BLOCKS)),
        ("arcee", {**ROTARY, "hidden_act": "relu2", "layer_norm_eps": 1e-3}),
        ("nanochat", {**NANOCHAT, "final_logit_softcapping": 15, "num_key_value_heads": 1}),
        ("nanochat", {**NANOCHAT, "tie_word_embeddings": False, "head_dim": 8, "attention_bias": True}),
    ],
)
def test_a_stock_class_computes_the_same_and_is_read_back(name: str, changes: dict[str, Any]) -> None:
    model, ids = random_model(**changes), torch.tensor([[5, 6, 7, 8, 9, 10], [500, 400, 300, 200, 100, 0]])
    stock = to_stock(model)
    assert type(stock) is STOCK_CLASSES[name].network
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    both: tuple[Any, ...] = (stock, model)
    texts = [each.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None) for each in both]
    assert torch.equal(*texts)
    layout, config, weights = from_stock(stock.config, stock.state_dict())
    back = network_with(FGPTForCausalLM, config, weights)
    assert layout == name
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-modern")])
def test_a_modern_preset_is_a_qwen3_of_its_sisters_size(preset: str) -> None:
    config, sister = network_config(PRESETS[preset]), network_config(PRESETS[preset.removesuffix("-modern")])
    assert fitting_class(config) == "qwen3"
    assert config.head_dim in (64, 128)
    for width in (config.hidden_size, config.intermediate_size, config.vocab_size):
        assert width is not None and width % 64 == 0  # every format and kernel takes them
    sizes = [count_parameters(each).total for each in (config, sister)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1 if preset.startswith("quickstart") else 0.01)


def test_a_block_whose_code_was_changed_without_a_switch_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = "fgpt_hf.model.blocks_fgpt.FGPTMLP.forward"
    monkeypatch.setattr(mlp, lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * 2))
    with pytest.raises(UserError, match="GPT2LMHeadModel does not compute the same as this network: logits differ by"):
        to_stock(random_model())


def test_a_field_that_is_new_in_fgpt_is_refused_until_a_class_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FGPTConfig, "parallel_residual", False, raising=False)
    monkeypatch.setitem(FGPTConfig.__annotations__, "parallel_residual", bool)
    model = random_model()
    model.config.parallel_residual = True
    with pytest.raises(UserError, match=r"lacks parallel_residual=True \(it needs False\)"):
        to_stock(model)


def test_weights_that_a_class_has_no_place_for_are_named() -> None:
    model = random_model()
    mlp: torch.nn.Module = model.model.layers[0].mlp
    mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel lacks 1 of this network's weights, such as .*mlp\.scale"):
        to_stock(model)


@pytest.mark.parametrize("changes", [{"norm_bias": False}, {"attention_bias": False, "mlp_bias": False}])
def test_missing_biases_are_zeros_in_a_gpt2(changes: dict[str, Any]) -> None:
    model, ids = random_model(**changes), torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(to_stock(model)(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_gpt2_export_is_stock_and_comes_back_as_it_went(folder: Path, tmp_path: Path) -> None:
    export(str(folder), tmp_path / "gpt2", "gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    ours, tokenizer = load_fgpt(str(folder))
    ids = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    assert type(theirs) is GPT2LMHeadModel and not list((tmp_path / "gpt2").glob("*.py"))
    torch.testing.assert_close(theirs(**ids).logits, ours(**ids).logits, rtol=0, atol=1e-5)
    assert theirs.generation_config.eos_token_id == [END_OF_TEXT_ID, END_OF_TURN_ID]
    prompt = AutoTokenizer.from_pretrained(tmp_path / "gpt2").apply_chat_template(QUESTION, tokenize=False)
    assert prompt == tokenizer.apply_chat_template(QUESTION, tokenize=False)

    assert (
        json.loads((tmp_path / "gpt2" / "tokenizer_config.json").read_text())["chat_template"]
        == (tmp_path / "gpt2" / "chat_template.jinja").read_text()
    )

    assert convert(str(tmp_path / "gpt2"), tmp_path / "back")[0] == "gpt2"
    back, _ = load_fgpt(str(tmp_path / "back"))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values(), strict=True))
    for field in (*FGPTConfig.attribute_map.values(), "vocab_size", "tie_word_embeddings"):
        assert getattr(back.config, field) == getattr(ours.config, field), field


def test_llama_cpp_writes_the_same_text_and_chats_by_the_same_template(folder: Path, tmp_path: Path) -> None:
    export(str(folder), tmp_path / "model.gguf", "gguf")
    server = llama_cpp(tmp_path / "model.gguf")
    model, tokenizer = load_fgpt(str(folder))
    for text in TEXTS:
        answer = server.handle_completions({"prompt": text, "temperature": 0, "n_predict": 16, "ignore_eos": True})
        assert answer["choices"][0]["text"] == greedy(model, tokenizer, text)
    answer = server.handle_chat_completions({"messages": QUESTION, "temperature": 0, "max_tokens": 8})
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_gguf_of_an_untied_head_without_biases_gives_the_same_text(tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    write_small_model(tmp_path / "model", **changes)
    export(str(tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    answer = llama_cpp(tmp_path / "model.gguf").handle_completions(
        {"prompt": TEXTS[0], "temperature": 0, "n_predict": 16, "ignore_eos": True}
    )
    assert answer["choices"][0]["text"] == greedy(*load_fgpt(str(tmp_path / "model")), TEXTS[0])


def test_a_gguf_of_a_converted_chat_model_ends_at_its_own_token(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokens = ["<|im_start|>", "<|im_end|>"]
    convert(str(write_gpt2_with(tmp_path / "chatml", tokens, CHATML)), tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 50258
    assert "tokenizer.ggml.padding_token_id" not in fields  # it has none
    assert fields["tokenizer.ggml.tokens"].contents()[50257:] == tokens
    assert fields["tokenizer.chat_template"].contents() == CHATML


def test_int8_weights_choose_the_same_tokens(folder: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    model, tokenizer = load_fgpt(str(folder))
    assert type(quantized.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        agree = quantized(ids).logits.argmax(-1) == model(ids).logits.argmax(-1)
    assert agree.float().mean() > 0.9


# Bad input


def test_what_llama_cpp_cannot_express_is_refused_by_its_field(tmp_path: Path) -> None:
    write_small_model(tmp_path / "model", hidden_act="gelu")
    with pytest.raises(UserError, match="llama.cpp's gpt2 cannot express hidden_act='gelu'"):
        export(str(tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


NEVER = {"attention_bias": True, "mlp_bias": False, "qk_norm": True}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({**NANOCHAT, "hidden_size": 32, "num_attention_heads": 2}, "llama.cpp does not know nanochat, only gpt2, "),
        (
            {**GATED, "mlp_bias": False, "hidden_act": "gelu"},
            "llama.cpp's llama cannot express hidden_act='gelu'",
        ),
        ({**GATED, **NEVER}, "llama.cpp's qwen3 cannot express attention_bias=True; export to qwen3 or onnx instead"),
        ({**GATED, "rope_parameters": LONGER}, "llama.cpp's llama cannot express rope_parameters={"),
    ],
)
def test_what_llama_cpp_lacks_is_named(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_small_model(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=re.escape(problem)):
        export(str(tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_network_whose_widths_do_not_divide_into_blocks_goes_out_as_f16_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    gguf = pytest.importorskip("gguf")
    target = tmp_path / "model.gguf"
    main.run(["export", str(folder), str(target), "--format", "gguf", "--outtype", "q8_0"])
    assert "written as F16: Q8_0 needs multiples of 32, unlike hidden_size=48" in caplog.text
    shown = capsys.readouterr().out
    assert f"as gguf (GPT2LMHeadModel, F16), {target.stat().st_size:,} bytes" in shown
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    assert (kinds["blk.0.ffn_up.weight"], kinds["position_embd.weight"]) == ("F16", "F32")


def test_four_bits_are_for_the_layers_alone(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_small_model(tmp_path / "model", hidden_size=64, num_attention_heads=4)
    assert export(str(tmp_path / "model"), tmp_path / "m.gguf", "gguf", "Q4_0") == "GPT2LMHeadModel, Q4_0"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.1.attn_qkv.weight"], kinds["token_embd.weight"]) == ("Q4_0", "Q8_0")
    assert kinds["blk.1.attn_norm.weight"] == kinds["blk.1.ffn_up.bias"] == "F32"


def test_a_missing_package_is_named_with_its_extra(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "fgpt_hf.convert.gguf", raising=False)
    with pytest.raises(UserError, match=r"a package is missing .*gguf.*: pip install 'fgpt-hf\[export\]'"):
        export(str(folder), tmp_path / "model.gguf", "gguf")


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError,
        match="llama is a llama already, which .* load as it is: export it as gguf or onnx",
    ):
        export(str(tmp_path / "llama"), tmp_path / "model", "gpt2")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{empty}", "{new}", "--format", "gpt2"], "neither the folder nor its model/ holds config.json and"),
        (["nobody/nothing", "{new}", "--format", "gpt2"], "or the id of a model on the Hub"),
        (["{model}", "{model}", "--format", "gpt2"], "already exists: choose another name, or delete it"),
        (["{model}", "{new}", "--format", "gguf"], "the name of a GGUF file must end in .gguf"),
        (["{model}", "{new}", "--format", "tflite"], "format='tflite' is unknown: choose from auto, gpt2"),
        (["{model}", "{new}", "--format", "qwen3"], "Qwen3ForCausalLM lacks position_embedding='learned' (it needs"),
        (["{model}", "{new}.gguf", "--format", "gguf", "--outtype", "Q5"], "outtype='Q5' is unknown: choose from F32,"),
        (["{model}", "{new}", "--outtype", "F16"], "outtype='F16' needs format='gguf'"),
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
    assert problem in refusal(["export", *arguments], monkeypatch, capsys)
    assert not (tmp_path / "new").exists()
