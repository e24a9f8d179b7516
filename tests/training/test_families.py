"""Models of further families are tuned with adapters, scored and chatted with; what cannot be is refused by name."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from fgpt_hf.chat import ChatSession, load_for_chat
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.training.start_model import open_model
from tests.support.families import FAMILIES, family_model, save_family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_gets_adapters_that_learn(name: str, tmp_path: Path) -> None:
    run = InstructRun(model_name_or_path=str(save_family(name, tmp_path)), use_peft=True, lora_r=2)
    if name == "mamba":
        with pytest.raises(UserError, match="'out_proj' is incompatible.*the layers of this model are dt_proj, in_pro"):
            open_model(run)
        run = InstructRun(model_name_or_path=str(tmp_path), use_peft=True, lora_target_modules="in_proj,x_proj")
    model, ids = open_model(run).model, torch.arange(5, 25)[None]
    LanguageModelObjective(model.train())({"input_ids": ids, "labels": ids}).backward()
    learning = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in learning.values())
    assert all(gradient.norm() > 0 for name, gradient in learning.items() if "lora_B" in name and gradient is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_is_scored_and_chatted_with(name: str, tmp_path: Path) -> None:
    """The context is longer than a sliding window."""
    model, context, endings = family_model(name), tuple(range(5, 25)), ((7, 8), (9, 30, 31))
    scores = Scorer(Accelerator(cpu=True), model).score([[Row(context + ending, len(ending)) for ending in endings]])
    for score, ending in zip(scores[0], endings, strict=True):
        ids = torch.tensor([context + ending])
        with torch.no_grad():
            losses = model(input_ids=ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])
        assert score.log_likelihood == pytest.approx(losses[-len(ending) :].sum().item(), rel=1e-4)
    loaded = load_for_chat(str(save_family(name, tmp_path)))
    reply = ChatSession(*loaded, {"do_sample": False}, 4).answer("What is 3?", write=lambda text: None)
    assert isinstance(reply.text, str)


def test_a_loss_that_balances_experts_is_left_out_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With it, transformers cannot generate."""
    start = save_family("mixtral", tmp_path, output_router_logits=True)
    model = open_model(InstructRun(model_name_or_path=str(start))).model
    assert "asks for a loss that balances its experts (output_router_logits)" in caplog.text
    assert not model.config.output_router_logits
    ChatSession(*load_for_chat(str(start)), {"do_sample": False}, 4).answer("What is 3?", write=lambda text: None)
