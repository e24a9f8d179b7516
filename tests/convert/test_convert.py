"""Models in and out: complete folders, the same text in every program, and plain errors."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.cli import main
from fgpt_hf.convert.convert import convert
from fgpt_hf.convert.export import export
from fgpt_hf.model.io import load_fgpt, save_model
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TEXT_ID, END_OF_TURN_ID, PAD_ID, build_tokenizer
from tests.convert.test_layouts import checkpoint, restated

CONTEXT = 64
TEXTS = ("Once upon a time", "def f(x):\n    return  x", "naïve café 日本")
QUESTION = [{"role": "user", "content": "Who <|end|> are you?"}]


def small_model(**changes) -> FGPTForCausalLM:
    """A network with the real vocabulary, whose random weights make up their mind."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": CONTEXT}
    model = FGPTForCausalLM(FGPTConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[END_OF_TEXT_ID, END_OF_TURN_ID], pad_token_id=PAD_ID
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's folder."""
    path = tmp_path_factory.mktemp("models") / "fgpt"
    save_model(small_model(), build_tokenizer(CONTEXT), path)
    return path


def greedy(model: FGPTForCausalLM, tokenizer, text: str, new_tokens: int = 16) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def full_vocabulary(layout: str, size: int) -> dict[str, torch.Tensor]:
    """A checkpoint of this layout with as many tokens as a real one."""
    embeddings = 0.2 * torch.randn(size, 48, generator=torch.Generator().manual_seed(2))
    return checkpoint(layout) | {"transformer.wte.weight": embeddings, "lm_head.weight": embeddings}


# In


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
        ids = torch.cat([ids, restated(state, ids)[:, -1:].argmax(-1)], dim=1)
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


# Out


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

    assert convert(str(tmp_path / "gpt2"), tmp_path / "back")[0] == "gpt2"
    back, _ = load_fgpt(str(tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values(), strict=True))
    for field in (*FGPTConfig.attribute_map.values(), "vocab_size", "tie_word_embeddings"):
        assert getattr(back.config, field) == getattr(ours.config, field), field


def test_llama_cpp_writes_the_same_text_and_chats_by_the_same_template(folder: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    export(str(folder), tmp_path / "model.gguf", "gguf")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = (
        str(tmp_path / "model.gguf"),
        CONTEXT,
        1,
        False,
    )
    options.cpuparams.n_threads = 1
    server = xllamacpp.Server(options)
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
    xllamacpp = pytest.importorskip("xllamacpp")
    changes = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    save_model(small_model(**changes), build_tokenizer(CONTEXT), tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = (
        str(tmp_path / "model.gguf"),
        CONTEXT,
        1,
        False,
    )
    answer = xllamacpp.Server(options).handle_completions(
        {"prompt": TEXTS[0], "temperature": 0, "n_predict": 16, "ignore_eos": True}
    )
    assert answer["choices"][0]["text"] == greedy(*load_fgpt(str(tmp_path / "model")), TEXTS[0])


@pytest.mark.slow
def test_onnx_runtime_agrees_for_any_batch_length_and_cache(folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    export(str(folder), tmp_path / "onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    model, tokenizer = load_fgpt(str(folder))
    for texts in (TEXTS, TEXTS[:1], ["x"]):
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        expected = model(ids, attention_mask=mask).logits.detach()
        for known in {0, ids.shape[1] // 2}:
            with torch.no_grad():
                past = model(ids[:, :known], attention_mask=mask[:, :known]).past_key_values if known else None
            feeds = {"input_ids": ids[:, known:].numpy(), "attention_mask": mask.numpy()}
            caches = [name for name in (given.name for given in session.get_inputs()) if name not in feeds]
            for name, (layer, part) in zip(
                caches, [(i, part) for i in range(2) for part in ("keys", "values")], strict=True
            ):
                assert name.endswith(f"{layer}.{part}")
                empty = np.zeros((len(ids), 3, 0, 16), dtype=np.float32)
                feeds[name] = getattr(past.layers[layer], part).numpy() if past else empty
            logits = torch.from_numpy(session.run(["logits"], feeds)[0])
            seen = mask[:, known:].bool()
            torch.testing.assert_close(logits[seen], expected[:, known:][seen], rtol=0, atol=1e-4)


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


def save_checkpoint(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


class Trap:
    """A pickle that would leave a file behind if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_is_not_weights_is_refused_without_being_executed(writer, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    writer({"model": Trap(trace)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth: it .* pickle .* not executed|weights.pth: it cannot be read"):
        convert(str(tmp_path / "weights.pth"), tmp_path / "model")
    assert not trace.exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot be read as a checkpoint"),
        (b"PK\x03\x04 not a zip", "cannot be read as a checkpoint|was not executed"),
        (b"not a pickle", "cannot be read as a checkpoint|was not executed"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        convert(str(tmp_path / "weights.pth"), tmp_path / "model")


def test_a_tensor_alone_and_an_unknown_layout_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alone.pth: it holds a Tensor, not weights by name"):
        convert(str(save_checkpoint(tmp_path / "alone.pth", torch.ones(3))), tmp_path / "model")
    other = save_checkpoint(tmp_path / "other.pth", {"conv.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"other.pth: unknown layout: expected transformer.h.N.* found conv.weight"):
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
def test_vocabularies_and_heads_that_do_not_fit_are_refused(tokens, options, problem, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "weights.pth", full_vocabulary("original-2026", tokens))
    with pytest.raises(ValueError, match=problem):
        convert(str(source), tmp_path / "model", **options)


def test_a_folder_of_another_model_is_refused_both_ways(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="llama holds a model of the type 'llama': convert takes 'gpt2' from folders"):
        convert(str(tmp_path / "llama"), tmp_path / "model")
    with pytest.raises(ValueError, match="llama holds a model of type 'llama', not 'fgpt'"):
        export(str(tmp_path / "llama"), tmp_path / "model", "gpt2")


def test_another_tokenizer_than_gpt2s_is_refused(folder: Path, tmp_path: Path) -> None:
    export(str(folder), tmp_path / "gpt2", "gpt2")
    tokenizer = json.loads((tmp_path / "gpt2" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["The"] = vocabulary["The"], vocabulary["the"]
    (tmp_path / "gpt2" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="has another tokenizer than GPT-2's: they differ in 2 tokens"):
        convert(str(tmp_path / "gpt2"), tmp_path / "model")


def test_what_llama_cpp_cannot_express_is_refused_by_its_field(tmp_path: Path) -> None:
    save_model(small_model(hidden_act="gelu"), build_tokenizer(CONTEXT), tmp_path / "model")
    with pytest.raises(ValueError, match="hidden_act='gelu' is an architecture that llama.cpp's GPT-2 cannot express"):
        export(str(tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["export", "{empty}", "{new}", "--format", "gpt2"],
            "neither the folder nor its model/ holds config.json and *.safetensors",
        ),
        (
            ["export", "nobody/nothing", "{new}", "--format", "gpt2"],
            "or the id of a model on the Hub",
        ),
        (["export", "{model}", "{model}", "--format", "gpt2"], "is there already: choose another name, or delete it"),
        (["export", "{model}", "{new}", "--format", "gguf"], "a GGUF file's name ends in .gguf"),
        (
            ["export", "{model}", "{new}", "--format", "tflite"],
            "format='tflite' is unknown: choose from gpt2",
        ),
        (["convert", "{empty}/none.pth", "{new}"], "or the id of a model on the Hub"),
        (["convert", "{model}", "{empty}/../fgpt"], "is there already"),
        (["convert", "{model}", "{new}"], "holds a model of the type 'fgpt': convert takes 'gpt2' from folders"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, problem, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = folder.parent / "empty"
    empty.mkdir(exist_ok=True)
    places = {"model": folder, "empty": empty, "new": tmp_path / "new"}
    monkeypatch.setattr("sys.argv", ["fgpt", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_the_command_line_converts_and_exports(tmp_path: Path, capsys) -> None:
    source = save_checkpoint(tmp_path / "weights.pth", full_vocabulary("original-2025", 50304))
    main.run(["convert", str(source), str(tmp_path / "model"), "--num_attention_heads", "6"])
    assert "original-2025" in capsys.readouterr().out
    main.run(["export", str(tmp_path / "model"), str(tmp_path / "gpt2"), "--format", "gpt2"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").config.n_head == 6
