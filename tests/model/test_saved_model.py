"""Weights that are tied, saved, loaded, offloaded and shared, and folders that load by their own code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM, FGPTModel
from fgpt_hf.model.own_code import CODE
from tests.support.tiny_network import (
    EVERY_NETWORK,
    MODERN,
    VOCABULARY,
    random_ids,
    tiny_config,
    tiny_model,
)

# Weights: tied, saved, loaded, offloaded


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return list(tensors.keys())


def test_the_tie_survives_saving_and_loading_as_one_tensor(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    names = stored_names(tmp_path)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = FGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        FGPTModel.from_pretrained(tmp_path)(random_ids(1, 4)).last_hidden_state.shape, (1, 4, 48)
    )


def test_embeddings_can_be_untied(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in stored_names(tmp_path)
    ids = random_ids(1, 5)
    torch.testing.assert_close(FGPTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_head_shares_its_gradient_with_the_embeddings() -> None:
    model = tiny_model()
    ids = random_ids(1, 5)
    model(ids, labels=ids).loss.backward()
    assert (model.model.embed_tokens.weight.grad.abs().sum(-1) > 0).all()  # the head reaches words that no input holds


def test_it_loads_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = FGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.model.embed_tokens.weight
    ids = random_ids(1, 12)
    logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids).logits, rtol=0.1, atol=0.1)


def test_weights_offloaded_to_disk_give_the_same_logits(tmp_path: Path) -> None:
    from accelerate import disk_offload

    model = tiny_model()
    ids = random_ids(1, 12)
    expected = model(ids).logits
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    disk_offload(model, tmp_path, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)


def test_resized_embeddings_stay_tied() -> None:
    model = tiny_model()
    ids = random_ids(1, 5)
    before = model(ids).logits
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == model.lm_head.out_features == VOCABULARY + 8
    torch.testing.assert_close(model(ids).logits[..., :VOCABULARY], before)


# Plans


def test_every_rule_of_every_plan_names_a_module() -> None:
    model = tiny_model()
    modules = {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()
    }
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        assert plan.keys() <= modules
    assert {rule.rpartition(".")[2] for rule in model.tp_plan} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
    }
    assert {"model.embed_tokens", "model.layers.*", "model.norm", "lm_head"} == model.fsdp_plan.keys()
    assert {type(module).__name__ for module in model.modules()} >= set(model._no_split_modules)


DISTRIBUTED = """
import sys, torch, torch.distributed
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from transformers.distributed import DistributedConfig

size, *folders = sys.argv[1:]
torch.set_num_threads(1)
ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[0, :4] = 0
options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False)
for folder in folders:
    whole = FGPTForCausalLM.from_pretrained(folder).eval()
    shared = FGPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{size: 2})).eval()
    with torch.no_grad():
        torch.testing.assert_close(shared(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
    assert torch.equal(shared.generate(ids, **options), whole.generate(ids, **options))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tp_size", "pp_size", "fsdp_size"])
def test_two_processes_share_a_model_by_its_plans(size: str, tmp_path: Path) -> None:
    folders = [tmp_path / "gpt2", tmp_path / "qwen3", tmp_path / "nanochat"]
    for folder in folders:
        tiny_model(**{"num_attention_heads": 4} | EVERY_NETWORK[folder.name]).save_pretrained(folder)
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "run.py"), size, *map(str, folders)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


# Remote code

STRANGER = """
import json, sys
sys.modules["fgpt_hf"] = None  # any import of it is now an ImportError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
ids = torch.tensor([[5, 6, 7]])
options = dict(max_new_tokens=20, do_sample=False)
texts = [model.generate(ids, use_cache=cache, **options)[0].tolist() for cache in (True, False)]
model.save_pretrained(again)
print(json.dumps({
    "types": [type(thing).__name__ for thing in (config, base, model, new)],
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    "texts": texts,
    "logits": model(ids).logits.tolist(),
    "residual": new.model.layers[0].mlp.down_proj.weight.std().item(),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [{}, MODERN["qwen3"]], ids=["gpt2", "qwen3"])
def test_a_stranger_loads_and_runs_a_saved_folder_by_its_own_code(blocks: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**blocks)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "stranger.py").write_text(STRANGER)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "stranger.py", str(tmp_path / "model"), str(tmp_path / "again")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["types"] == ["FGPTConfig", "FGPTModel", "FGPTForCausalLM", "FGPTForCausalLM"]
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert report["texts"] == [expected, expected]
    assert torch.equal(torch.tensor(report["logits"]), model(torch.tensor([[5, 6, 7]])).logits)
    assert report["tied"]
    assert report["residual"] == pytest.approx(0.02 / 4**0.5, rel=0.05)
    for name in CODE:  # a stranger's copy is as complete as the first
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


def test_the_auto_class_gives_the_model_for_its_config() -> None:
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is FGPTForCausalLM
