"""The attention of a run: what it names if that can train here, or what suits the device and the precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.runtime import attention
from fgpt_hf.runtime.attention import resolve_attn_implementation, set_attention
from tests.support.tiny_network import tiny_model

KERNEL = "kernels-community/flash-attn3"


def resolved(named: str, device: str = "cuda", precision: str = "bf16", dropout: float = 0.0) -> str:
    accelerator: Any = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    return resolve_attn_implementation(Run(attn_implementation=named), accelerator, dropout)


def test_auto_takes_the_kernel_for_packed_rows_on_a_gpu_in_half_precision() -> None:
    assert resolved("auto") == resolved("auto", precision="fp16") == "varlen_attention"
    assert resolved("auto", precision="no") == resolved("auto", device="cpu") == resolved("auto", dropout=0.1) == "sdpa"


def test_auto_prefers_flash_attention_3_where_somebody_installed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: True)
    assert resolved("auto") == "flash_attention_3"


@pytest.mark.parametrize(
    ("named", "given", "said"),
    [
        ("varlen_attention", {"dropout": 0.1}, "has no dropout, and the attention's is 0.1: auto takes sdpa"),
        ("flex_attention", {"device": "cpu"}, "cannot train on a cpu"),
        (KERNEL, {"device": "cpu"}, "needs a CUDA GPU and --bf16 or --fp16"),
        (KERNEL, {"precision": "no"}, "needs a CUDA GPU and --bf16 or --fp16"),
    ],
)
def test_what_cannot_train_here_is_refused(
    named: str, given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_kernels_available", lambda: True)
    with pytest.raises(UserError, match=said):
        resolved(named, **given)


def test_a_kernel_that_cannot_be_had_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: PreTrainedModel, name: str) -> None:
        raise ValueError(f"An error occurred while trying to load from '{name}': no network.\nand more")

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", fail)
    with pytest.raises(UserError, match=f"^attn_implementation={KERNEL} cannot be loaded: .*: no network.$"):
        set_attention(tiny_model(), Run(attn_implementation=KERNEL), KERNEL)


def test_a_model_that_has_one_attention_alone_keeps_it_unless_the_run_names_another() -> None:
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**shape))
    set_attention(model, Run(), "sdpa")
    with pytest.raises(UserError, match="attn_implementation=sdpa cannot be loaded: MambaForCausalLM does not support"):
        set_attention(model, Run(attn_implementation="sdpa"), "sdpa")
