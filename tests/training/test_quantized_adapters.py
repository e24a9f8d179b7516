"""QLoRA: adapters on weights of 4 bits learn as on the same weights in float32, and end in the model's own weights."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fgpt_hf.config.runs import InstructRun
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines
from fgpt_hf.model.shapes import shape_of
from fgpt_hf.training.start_model import open_model
from tests.support.any_models import save_any, write_chats
from tests.support.families import save_family
from tests.support.forked import run_command
from tests.support.tiny import random_model, save

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 weights share a scale


def four_bit_run(folder: Path, **fields: Any) -> InstructRun:
    options = {"lora_r": 4, "bf16": False, **fields}
    return InstructRun(model_name_or_path=str(folder), use_peft=True, load_in_4bit=True, **options)


@pytest.fixture(scope="module", params=["fgpt", "gpt2", "llama"])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "fgpt":
        return save(random_model(**WIDE), folder)
    return save_any(request.param, folder, **({"n_embd": 64} if request.param == "gpt2" else WIDE))


def opened(run: InstructRun) -> PreTrainedModel:
    torch.manual_seed(0)  # GPT-2's embeddings grow, by random rows
    return open_model(run).model


def adapter_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of adapters with random values, after an evaluation, which must not change them."""
    torch.manual_seed(1)
    learning = {name: weight for name, weight in sorted(model.named_parameters()) if "lora_" in name}
    for weight in learning.values():
        nn.init.normal_(weight, std=0.1)
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        model.eval()(ids)
    model.train()(ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in learning.items() if weight.grad is not None}


def test_all_layers_are_frozen_in_4_bits_and_adapters_get_the_gradients_of_the_same_weights_in_float32(
    start: Path,
) -> None:
    run = four_bit_run(start)
    model, whole = opened(run), opened(replace(run, load_in_4bit=False))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    assert {name.removesuffix(".base_layer") for name in layers} == set(shape_of(model.config).linear_layers)
    originals = dict(whole.named_modules())
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        original = originals[name]
        with torch.no_grad():
            original.weight.copy_(weight if isinstance(original, nn.Linear) else weight.T)  # GPT-2's are transposed
    found, expected = adapter_gradients(model), adapter_gradients(whole)
    assert len(found) == 2 * len(layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama and the folder of a run on it, with a checkpoint after half of its steps."""
    place = tmp_path_factory.mktemp("trained")
    llama, chats = save_any("llama", place / "llama", **WIDE), write_chats(place / "chats.jsonl")
    command = [
        *("train_instruct.py", "--preset=rasbt", "--use_peft", "--load_in_4bit", "--lora_r=4", "--max_length=64"),
        *("--max_steps=8", "--save_steps=4", "--eval_steps=4", "--sample_steps=8", "--warmup_steps=1"),
        *("--learning_rate=0.01", "--max_new_tokens=4", "--validation_prompts=1", "--bf16=false"),
        *("--per_device_train_batch_size=2", "--gradient_accumulation_steps=1"),
        *(f"--model_name_or_path={llama}", f"--dataset_name={chats}"),
    ]
    train(*command, f"--output_dir={place / 'run'}")
    return SimpleNamespace(llama=llama, command=command, run=place / "run")


def train(*command: str) -> None:
    done = run_command(*command)
    assert done.returncode == 0, done.stderr


def test_the_loss_falls_and_the_adapters_end_in_the_models_own_weights(trained: Any) -> None:
    losses = [line["eval_loss"] for line in read_json_lines(trained.run / "metrics.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0] - 1
    adapters = load_file(trained.run / "checkpoints" / "step_00000008" / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (trained.llama, trained.run / "model"))
    assert before.keys() == after.keys() and len(adapters) == 2 * 7 * 2  # seven layers in each of two blocks
    for name, weight in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in adapters:
            change = adapters[f"{path}.lora_B.weight"] @ adapters[f"{path}.lora_A.weight"] * (32 / 4)
            assert change.abs().max() > 1e-3
            torch.testing.assert_close(after[name], weight + change)
        else:
            assert torch.equal(after[name], weight)


def test_a_run_goes_on_bit_by_bit_from_a_checkpoint(trained: Any, tmp_path: Path) -> None:
    again = shutil.copytree(trained.run, tmp_path / "again")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step_00000008")
    train(*trained.command, f"--output_dir={again}", "--resume_from_checkpoint=latest")
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (again, trained.run))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_what_cannot_be_is_refused_with_what_would_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = four_bit_run(save_any("llama", tmp_path))

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            open_model(run)
        return str(error.value)

    with monkeypatch.context() as patch:
        patch.setattr("bitsandbytes.supported_torch_devices", {"cuda", "xpu"})
        assert "needs a device that bitsandbytes serves (cuda, xpu), and this is a cpu: leave it out" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr("fgpt_hf.model.quantization.find_spec", lambda name: None)
        assert refusal() == "load_in_4bit needs bitsandbytes: pip install 'fgpt-hf[qlora]'"
    mamba = save_family("mamba", tmp_path / "mamba")
    with pytest.raises(UserError, match="a MambaForCausalLM cannot compute with layers in 4 bits .*: leave it out for"):
        open_model(four_bit_run(mamba, lora_target_modules="in_proj"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10_000))
    assert "and this machine has 0 GB: give --merge_adapter false" in refusal()
