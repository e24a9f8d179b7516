"""Adapters: a folder with nothing else in it loads as the whole model, or says why not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgpt_hf.convert.export import export
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import load_fgpt, load_model, save_model
from fgpt_hf.model.lora import ADAPTER, adapter_parameters, has_adapter
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, ROLE_TOKENS
from fgpt_hf.training.start_model import open_model
from tests.support.loopback_hub import LoopbackHub
from tests.support.tiny import random_model, save
from tests.support.tiny_network import MODERN
from tests.training.test_finetuning import logits, run_from, step_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model to train adapters on."""
    return save(random_model(), tmp_path_factory.mktemp("base"))


def test_an_adapter_loads_as_the_whole_model_with_its_own_ends(base: Path, tmp_path: Path) -> None:
    model, own_tokenizer, *_ = open_model(run_from(base, use_peft=True, lora_r=4))
    step_of(model)
    save_model(model, own_tokenizer, tmp_path / "run" / "model")
    for load in (load_model, load_fgpt):
        whole, _ = load(str(tmp_path / "run" / "model"))
        assert type(whole) is FGPTForCausalLM and not has_adapter(whole)
        torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
        assert whole.generation_config.eos_token_id == model.generation_config.eos_token_id
    export(str(tmp_path / "run"), tmp_path / "gpt2", "gpt2")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "gpt2"))[0]), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", MODERN)
def test_an_adapter_on_other_blocks_learns_the_role_tokens_of_both_embeddings(network: str, tmp_path: Path) -> None:
    start = random_model(**MODERN[network])
    run = run_from(save(start, tmp_path / "base"), use_peft=True, lora_r=4)
    model, own_tokenizer, *_ = open_model(run)
    assert model.num_parameters(only_trainable=True) == adapter_parameters(run, model.config)
    step_of(model)
    save_model(model, own_tokenizer, tmp_path / "adapter")
    whole, _ = load_fgpt(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
    moved = (whole.lm_head.weight != start.lm_head.weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == sorted(CONTROL_TOKENS[token] for token in ROLE_TOKENS)


def test_an_adapter_on_an_adapter_keeps_both(base: Path, tmp_path: Path) -> None:
    for start, target in ((base, tmp_path / "first"), (tmp_path / "first", tmp_path / "second")):
        model, own_tokenizer, *_ = open_model(run_from(start, use_peft=True, lora_r=4))
        step_of(model)
        save_model(model, own_tokenizer, target)
    whole, _ = load_fgpt(str(tmp_path / "second"))
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)


def changed_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def test_an_adapter_that_cannot_be_merged_is_one_clear_line(base: Path, tmp_path: Path, server: LoopbackHub) -> None:
    model, own_tokenizer, *_ = open_model(run_from(base, use_peft=True, lora_r=4))
    save_model(model, own_tokenizer, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / ADAPTER)

    def problem() -> str:
        with pytest.raises(UserError) as refusal:
            load_fgpt(str(tmp_path / "adapter"))
        return str(refusal.value)

    for part, said in {"lora_B": "missing adapter keys", "trainable_tokens": "is missing"}.items():
        kept = {name: weight for name, weight in weights.items() if part not in name}
        save_file(kept, tmp_path / "adapter" / ADAPTER)
        assert "does not fit" in problem() and said in problem()
    save_file({name: weight[:-1].clone() for name, weight in weights.items()}, tmp_path / "adapter" / ADAPTER)
    assert "does not fit" in problem() and "size mismatch" in problem()
    (tmp_path / "adapter" / ADAPTER).write_bytes(b"cut")
    assert "adapter are damaged" in problem()
    for name in (str(tmp_path / "gone"), "gone"):
        changed_config(tmp_path / "adapter", base_model_name_or_path=name)
        assert f"no model '{name} (the base model of the adapter {tmp_path / 'adapter'})'" in problem()
    changed_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "adapter"))
    assert "neither has whole weights" in problem()
    changed_config(tmp_path / "adapter", base_model_name_or_path=None)
    assert "names no base_model_name_or_path" in problem()
    (tmp_path / "adapter" / "adapter_config.json").write_text("[")
    assert "adapter_config.json is damaged" in problem()
