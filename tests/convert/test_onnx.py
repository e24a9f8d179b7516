"""ONNX exports: ONNX Runtime computes the same logits, and Transformers.js writes the same text."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from fgpt_hf.convert.export import export
from fgpt_hf.model.io import load_fgpt
from tests.convert.models import QUESTION, TEXTS, write_small_model

pytestmark = pytest.mark.slow
onnxruntime = pytest.importorskip("onnxruntime")

PACKAGE = "@huggingface/transformers"
CHAT = """
    const { AutoModelForCausalLM, AutoTokenizer, env } = require("@huggingface/transformers");
    const path = require("path");
    const [folder, text, messages] = process.argv.slice(1);
    env.allowRemoteModels = false;
    env.localModelPath = path.dirname(folder);
    (async () => {
        const tokenizer = await AutoTokenizer.from_pretrained(path.basename(folder));
        const model = await AutoModelForCausalLM.from_pretrained(path.basename(folder));
        const write = async (inputs) => {
            const ids = await model.generate({ ...inputs, max_new_tokens: 16, do_sample: false });
            return ids.tolist().map((row) => row.map(Number));
        };
        const prompt = tokenizer.apply_chat_template(
            JSON.parse(messages), { tokenize: false, add_generation_prompt: true });
        const inputs = { text: tokenizer(text), chat: tokenizer(prompt, { add_special_tokens: false }) };
        const written = { text: await write(inputs.text), chat: await write(inputs.chat) };
        console.log(JSON.stringify({ prompt, ...written }));
    })();
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    return write_small_model(tmp_path_factory.mktemp("models") / "fgpt")


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    """The same model as ONNX."""
    export(str(source), source.with_name("onnx"), "onnx")
    return source.with_name("onnx")


def transformers_js() -> dict[str, str]:
    """The environment in which node finds Transformers.js: in NODE_PATH, or installed globally."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    root = subprocess.run([npm, "root", "--global"], capture_output=True, text=True, check=True).stdout.strip()
    folders = [*os.environ.get("NODE_PATH", "").split(os.pathsep), root]
    if not any(folder and Path(folder, PACKAGE).is_dir() for folder in folders):
        pytest.skip(f"needs Transformers.js: npm install --global {PACKAGE}")
    return {**os.environ, "NODE_PATH": os.pathsep.join(filter(None, folders))}


def test_the_folder_is_laid_out_as_other_programs_look_for_it(exported: Path) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    configs = {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert files == {"onnx/model.onnx", *configs, "tokenizer.json", "chat_template.jinja"}
    config, generation, tokenizer = (json.loads((exported / name).read_text()) for name in sorted(configs))
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert generation["eos_token_id"] == [50256, 50260]
    assert tokenizer["chat_template"] == (exported / "chat_template.jinja").read_text()
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    cached = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cached)]
    assert [given.name for given in session.get_inputs()] == names
    assert [given.name for given in session.get_outputs()] == ["logits", *(f"present.{name}" for name in cached)]


def test_onnx_runtime_agrees_for_any_batch_length_and_cache(source: Path, exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    model, tokenizer = load_fgpt(str(source))
    for texts in (TEXTS, TEXTS[:1], ["x"]):
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits.detach()
        cache: dict[str, Any] = {
            f"past_key_values.{layer}.{part}": np.zeros((len(ids), 3, 0, 16), dtype=np.float32)
            for layer in range(2)
            for part in ("key", "value")
        }
        for begin, end in ((0, ids.shape[1] // 2), (ids.shape[1] // 2, ids.shape[1])):
            if begin == end:
                continue
            feeds = {"input_ids": ids[:, begin:end].numpy(), "position_ids": positions[:, begin:end].numpy()}
            feeds |= {"attention_mask": mask[:, :end].numpy(), **cache}
            logits, *present = session.run(None, feeds)
            cache = dict(zip(cache, present, strict=True))
            seen = mask[:, begin:end].bool()
            torch.testing.assert_close(torch.from_numpy(logits)[seen], expected[:, begin:end][seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_graph_bytes", [10**9, 0], ids=["one file", "weights apart"])
def test_transformers_js_writes_the_same_text_and_stops_where_the_model_stops(
    max_graph_bytes: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = transformers_js()
    model, tokenizer = load_fgpt(str(source))
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    unstopped = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    ends = [50256, int(unstopped[-8])]  # so that the reply ends in its midst
    model.generation_config = GenerationConfig(bos_token_id=50256, eos_token_id=ends, pad_token_id=50261)
    ending = shutil.copytree(source, tmp_path / "ending")
    model.generation_config.save_pretrained(ending)

    monkeypatch.setattr("fgpt_hf.convert.onnx.MAX_GRAPH_BYTES", max_graph_bytes)
    export(str(ending), tmp_path / "exported", "onnx")
    assert (tmp_path / "exported" / "onnx" / "model.onnx_data").is_file() == (max_graph_bytes == 0)
    command = ["node", "-e", CHAT, str(tmp_path / "exported"), TEXTS[1], json.dumps(QUESTION)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prompt"] == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    for name, given in {"text": tokenizer(TEXTS[1], return_tensors="pt"), "chat": inputs}.items():
        assert found[name] == model.generate(**given, max_new_tokens=16, do_sample=False).tolist(), name
    assert found["chat"][0][-1] == ends[1] and len(found["chat"][0]) < len(unstopped)
