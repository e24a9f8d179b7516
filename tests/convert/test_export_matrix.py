"""Every architecture in every format and runtime writes the same greedy text as the model that it was exported from."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.convert.export import export
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from tests.convert.models import CONTEXT, SENTENCES, trained_model

pytestmark = pytest.mark.slow

ROTARY = {"position_embedding": "rope", "norm": "rmsnorm", "attention_bias": False, "mlp_bias": False}
GATED = {**ROTARY, "mlp": "gated", "hidden_act": "silu", "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {**GATED, "tie_word_embeddings": False},
    "llama, longer": {**GATED, "rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "qwen3": {**GATED, "qk_norm": True, "head_dim": 32},
    "arcee": {**ROTARY, "hidden_act": "relu2"},
    "nanochat": {
        **ROTARY,
        **{"hidden_act": "relu2", "norm_elementwise_affine": False, "embedding_norm": True, "qk_norm": True},
        **{"final_logit_softcapping": 15, "tie_word_embeddings": False},
    },
}
Writer = Callable[[str], str]
PROMPT_TOKENS, NEW_TOKENS = 4, 12


@cache
def model_of(architecture: str) -> FGPTForCausalLM:
    return trained_model(**ARCHITECTURES[architecture])


@cache
def greedy_texts(architecture: str) -> dict[str, str]:
    """What the model itself writes, by prompt."""
    return {prompt: continuation(model_of(architecture), prompt) for prompt in prompts()}


@cache
def prompts() -> list[str]:
    tokenizer = build_tokenizer(CONTEXT)
    return [str(tokenizer.decode(tokenizer.encode(sentence)[:PROMPT_TOKENS])) for sentence in SENTENCES]


def continuation(model: Any, prompt: str, tokenizer: Any = None) -> str:
    tokenizer = tokenizer or build_tokenizer(CONTEXT)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def in_transformers(target: Path) -> Writer:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    return lambda prompt: continuation(model, prompt, tokenizer)


def in_llama_cpp(target: Path) -> Writer:
    xllamacpp = pytest.importorskip("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(target), CONTEXT, 1, False
    options.cpuparams.n_threads = 1
    server = xllamacpp.Server(options)
    asked = {"temperature": 0, "n_predict": NEW_TOKENS, "ignore_eos": True}
    return lambda prompt: server.handle_completions({"prompt": prompt, **asked})["choices"][0]["text"]


def in_onnx_runtime(target: Path) -> Writer:
    session = pytest.importorskip("onnxruntime").InferenceSession(target / "onnx" / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(target)
    caches = [given for given in session.get_inputs() if given.name.startswith("past_key_values.")]

    def write(prompt: str) -> str:
        ids, known, written = np.array([tokenizer.encode(prompt)]), 0, list[int]()
        past = [np.zeros((1, given.shape[1], 0, given.shape[3]), dtype=np.float32) for given in caches]
        for _ in range(NEW_TOKENS):
            whole = known + ids.shape[1]
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, whole), dtype=np.int64)}
            feeds |= {"position_ids": np.arange(known, whole)[None]}
            feeds |= {given.name: values for given, values in zip(caches, past, strict=True)}
            logits, *past = session.run(None, feeds)
            written.append(int(logits[0, -1].argmax()))
            ids, known = np.array([written[-1:]]), whole
        return str(tokenizer.decode(written))

    return write


def cells() -> list[Any]:
    stock = [(name, "auto", None, in_transformers) for name in ARCHITECTURES]
    gguf = [
        (name, "gguf", outtype, in_llama_cpp)
        for name, outtypes in {
            "gpt2": ("F32", "Q8_0", "Q4_0"),
            "llama": ("F32", "Q8_0"),
            "llama, longer": ("F32",),
            "qwen3": ("F32", "F16", "BF16", "Q8_0", "Q4_0"),
            "arcee": ("F32",),
        }.items()
        for outtype in outtypes
    ]
    onnx = [(name, "onnx", None, in_onnx_runtime) for name in ("qwen3", "nanochat")]
    return [
        pytest.param(*cell, id=" ".join(filter(None, (cell[0], cell[1], cell[2], cell[3].__name__))))
        for cell in (*stock, *gguf, *onnx)
    ]


@pytest.mark.parametrize(("architecture", "format", "outtype", "runtime"), cells())
def test_the_greedy_text_is_the_same(
    architecture: str, format: str, outtype: str | None, runtime: Callable[[Path], Writer], tmp_path: Path
) -> None:
    save_model(model_of(architecture), build_tokenizer(CONTEXT), tmp_path / "model")
    target = tmp_path / ("exported.gguf" if format == "gguf" else "exported")
    export(str(tmp_path / "model"), target, format, outtype)
    write = runtime(target)
    assert {prompt: write(prompt) for prompt in prompts()} == greedy_texts(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_models_know_their_sentences_so_that_equal_texts_mean_something(architecture: str) -> None:
    for sentence, (prompt, text) in zip(SENTENCES, greedy_texts(architecture).items(), strict=True):
        assert sentence.startswith(prompt + text) and len(re.findall(r"\w+", text)) >= 3
