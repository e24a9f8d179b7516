"""What a tuning run begins with: which models are refused, where new tokens start, what adapters learn and leave."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import GPT2Config, GPT2LMHeadModel

from fgpt_hf.config.presets import INSTRUCT_PRESETS
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import save_model
from fgpt_hf.model.lora import restore_adapter
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TEXT_ID, PAD_ID, ROLE_TOKENS, build_tokenizer
from fgpt_hf.training.finetuning import merge_adapter
from fgpt_hf.training.optim import parameter_groups
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.start_model import open_model, unseen_role_tokens
from tests.support.tiny import random_model, save, tokenizer

pytestmark = pytest.mark.slow

ROLE_IDS = [CONTROL_TOKENS[token] for token in ROLE_TOKENS]


def run_from(folder: Path, **fields: Any) -> InstructRun:
    return replace(INSTRUCT_PRESETS["quickstart"], model_name_or_path=str(folder), **fields)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens without text have like embeddings, as training leaves them."""
    model = random_model()
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows[ROLE_IDS[0] :] = 1.0 + 0.01 * torch.rand(len(rows) - ROLE_IDS[0], rows.shape[1]).clamp(max=0.9)
        rows[PAD_ID + 1] = 1.02
    return save(model, tmp_path_factory.mktemp("base"))


def test_role_tokens_that_no_text_had_start_from_the_mean_and_others_stay(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    kept, *_ = open_model(run_from(base, new_token_init="keep"))
    model, *_ = open_model(run_from(base))
    rows, old_rows = (each.model.embed_tokens.weight for each in (model, kept))
    mean = old_rows[:END_OF_TEXT_ID].mean(dim=0)
    assert all(torch.allclose(rows[token], mean) for token in ROLE_IDS)
    others = [token for token in range(len(rows)) if token not in ROLE_IDS]
    assert torch.equal(rows[others], old_rows[others])
    assert "<|assistant|>, <|system|>, <|end|>: never seen by" in caplog.messages[0]


def test_role_tokens_that_a_model_knows_are_left_alone(base: Path, tmp_path: Path) -> None:
    model, *_ = open_model(run_from(base, new_token_init="keep"))
    with torch.no_grad():
        model.model.embed_tokens.weight[ROLE_IDS[:2]] *= 2
    assert unseen_role_tokens(model, tokenizer()) == list(ROLE_TOKENS[2:])


@pytest.mark.parametrize("width", [32, 256, 1024])
@pytest.mark.parametrize("unused", [7, 43])  # padding among them
def test_tokens_at_their_random_start_are_known_by_few_rows_of_their_kind(width: int, unused: int) -> None:
    model, common = random_model(hidden_size=width, vocab_size=PAD_ID + unused), 3 * torch.rand(width)
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows[ROLE_IDS[0] :] = common + 0.02 * torch.randn(len(rows) - ROLE_IDS[0], width)
        assert unseen_role_tokens(model, tokenizer()) == list(ROLE_TOKENS)
        rows[ROLE_IDS[0]] += 0.03 * torch.randn(width)
    assert unseen_role_tokens(model, tokenizer()) == list(ROLE_TOKENS[1:])


def test_models_that_cannot_be_tuned_are_refused_with_what_would_work(base: Path, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=64, vocab_size=50257)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    save(random_model(vocab_size=50257), tmp_path / "small")
    answers = {
        tmp_path / "gpt2": "has 50,262 tokens but 50,257 embeddings: call model.resize_token_embeddings",
        tmp_path / "small": "has 50,262 tokens but 50,257 embeddings: call model.resize_token_embeddings",
        tmp_path / "nowhere": "nowhere",
    }
    for folder, answer in answers.items():
        with pytest.raises(ValueError) as error:
            open_model(run_from(folder))
        assert answer in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_learn_and_are_saved_in_float32(
    stored: torch.dtype, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    half = FGPTForCausalLM.from_pretrained(base, dtype=stored)
    save(half, tmp_path / "half")
    model, own_tokenizer, *_ = open_model(run_from(tmp_path / "half", new_token_init="keep"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, half.model.embed_tokens.weight.float())
    name = str(stored).removeprefix("torch.")
    assert f"{tmp_path / 'half'} is stored in {name}: it is trained and saved in float32" in caplog.messages
    step_of(model)
    save_model(model, own_tokenizer, tmp_path / "result")
    result = FGPTForCausalLM.from_pretrained(tmp_path / "result")
    assert result.dtype == torch.float32 and torch.equal(logits(result), logits(model))


def test_an_adapter_of_a_model_in_half_precision_is_merged_in_float32(base: Path, tmp_path: Path) -> None:
    save(FGPTForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "half")
    run = run_from(tmp_path / "half", use_peft=True, lora_r=4, output_dir=str(tmp_path / "run"), bf16=False)
    model, own_tokenizer, *_ = open_model(run)
    step_of(model)
    folder = RunFolder(run)
    save_model(model, own_tokenizer, folder.model)
    merge_adapter(run, folder, own_tokenizer)
    whole = FGPTForCausalLM.from_pretrained(folder.model)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)


def test_tokens_that_a_user_added_do_not_make_role_tokens_look_unseen(base: Path, tmp_path: Path) -> None:
    model, *_ = open_model(run_from(base, new_token_init="keep"))
    own = build_tokenizer(64)
    own.add_tokens(["<tool>"])
    with torch.no_grad():
        model.model.embed_tokens.weight[[*ROLE_IDS, len(own) - 1]] *= 2
    save_model(model, own, tmp_path / "own")
    tuned, *_ = open_model(run_from(tmp_path / "own"))
    assert torch.equal(tuned.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_more_tokens_than_embeddings_are_refused(base: Path, tmp_path: Path) -> None:
    own = build_tokenizer(64)
    own.add_tokens([f"<tool {number}>" for number in range(50)])
    save_model(FGPTForCausalLM.from_pretrained(base), own, tmp_path / "own")
    with pytest.raises(UserError, match="has 50,312 tokens but 50,304 embeddings: call model.resize"):
        open_model(run_from(tmp_path / "own"))


# adapters


def step_of(model: FGPTForCausalLM) -> None:
    """Move whatever learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.tensor([[*ROLE_IDS, 5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in learning:
            parameter += 0.1 * torch.randn_like(parameter)


def logits(model: FGPTForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[*ROLE_IDS, 1, 2, 3]])).logits


def test_adapters_and_role_tokens_learn_and_nothing_else(base: Path) -> None:
    model, *_ = open_model(run_from(base, use_peft=True, lora_r=4))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    step_of(model)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name or "trainable_tokens" in name for name in moved)
    (rule, members) = parameter_groups(model)[0]
    assert {name for name, _ in members} == moved and not rule.is_inner


def test_an_adapter_that_was_saved_comes_back_and_works_in_peft(base: Path, tmp_path: Path) -> None:
    run = run_from(base, use_peft=True, lora_r=4)
    model, own_tokenizer, *_ = open_model(run)
    step_of(model)
    save_model(model, own_tokenizer, tmp_path / "adapter")
    fresh, *_ = open_model(run)
    restore_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    stranger = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(stranger), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
def test_a_run_leaves_the_adapter_or_the_whole_model(base: Path, tmp_path: Path, merge: bool) -> None:
    run = run_from(base, use_peft=True, lora_r=4, merge_adapter=merge, output_dir=str(tmp_path / "run"))
    model, own_tokenizer, *_ = open_model(run)
    step_of(model)
    folder = RunFolder(run)
    save_model(model, own_tokenizer, folder.model)
    merge_adapter(run, folder, own_tokenizer)
    assert (folder.model / "adapter_model.safetensors").is_file() is not merge
    assert (folder.model / "model.safetensors").is_file() is merge
    if merge:
        whole = FGPTForCausalLM.from_pretrained(folder.model)
        torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
        assert whole.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_wrong_adapters_are_refused(base: Path) -> None:
    for wrong in ("c_attn", "lm_head", "embed_tokens", "q_proj,c_attn"):
        with pytest.raises(
            ValueError,
            match=f"lora_target_modules={wrong} names a layer that this model lacks.* all-linear, or .* q_proj",
        ):
            open_model(run_from(base, use_peft=True, lora_target_modules=wrong))
    with pytest.raises(ValueError, match="use_peft and fsdp exclude each other"):
        run_from(base, use_peft=True, fsdp=True)
    with pytest.raises(ValueError, match="lora_r=0 must be above zero"):
        run_from(base, use_peft=True, lora_r=0)
