"""Losses and gradients of transformers' models equal their own, packed and padded, through whatever head they have."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedModel,
)

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.errors import UserError
from fgpt_hf.losses import output_head as heads
from fgpt_hf.losses.objectives import LanguageModelObjective, PreferenceLossConfig, PreferenceObjective
from fgpt_hf.losses.output_head import OwnHead, ProductHead, output_head
from fgpt_hf.model.document_isolation import keeps_documents_apart, require_causal
from tests.support.any_models import NAMES, any_model
from tests.support.families import FAMILIES, MIX_DOCUMENTS, family_model

LENGTHS = (9, 5, 10)
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **ENDS,
}
HEADS = {  # beside those of the five classes
    "a bias": (PhiConfig(**SHAPE), OwnHead),
    "a scale": (CohereConfig(**SHAPE, logit_scale=0.25), OwnHead),
    "a divisor": (GraniteConfig(**SHAPE, logits_scaling=3.0), OwnHead),
    "a softcap": (Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0), ProductHead),
}


def model_of(name: str) -> PreTrainedModel:
    if name in NAMES:
        return any_model(name)
    if name in FAMILIES:
        return family_model(name)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(HEADS[name][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def documents() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 96, (length,)) for length in LENGTHS]


def packed_batch() -> dict[str, torch.Tensor]:
    """One row with several documents, and padding that is not scored."""
    ids = torch.cat([*documents(), torch.zeros(3, dtype=torch.int64)])
    positions = torch.cat([torch.arange(length) for length in (*LENGTHS, 1, 1, 1)])
    labels = ids.clone()
    labels[-3:] = IGNORED
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


def padded_batch() -> dict[str, torch.Tensor]:
    """A row for each document."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, document in enumerate(documents()):
        ids[row, : len(document)] = labels[row, : len(document)] = document
    return {"input_ids": ids, "labels": labels}


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(model: PreTrainedModel, batch: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Compare with the loss that the model computes of `own` inputs, by transformers."""
    objective = LanguageModelObjective(model)
    mean = objective(batch) / objective.num_items(batch)
    expected = model(**own, use_cache=False).loss
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    found, wanted = gradients(model, mean), gradients(model, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", [*NAMES, *HEADS, *FAMILIES])
def test_losses_and_gradients_of_a_padded_batch_equal_transformers_own(name: str) -> None:
    model, batch = model_of(name), padded_batch()
    assert_equal(model, batch, {**batch, "attention_mask": (batch["labels"] != IGNORED).long()})


@pytest.mark.parametrize("name", [*NAMES, "a bias", "a softcap", *sorted(FAMILIES.keys() - MIX_DOCUMENTS)])
def test_losses_and_gradients_of_a_packed_batch_equal_transformers_own(name: str) -> None:
    """Of each document by itself: the row holds nothing that another one could see."""
    model, batch = model_of(name), packed_batch()
    assert keeps_documents_apart(model)
    assert_equal(model, batch, batch)
    alone = [model(input_ids=ids[None], labels=ids[None], use_cache=False).loss * (len(ids) - 1) for ids in documents()]
    batch["labels"][batch["position_ids"] == 0] = IGNORED  # a document's first token follows another document
    objective = LanguageModelObjective(model)
    torch.testing.assert_close(objective(batch), torch.stack(alone).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, *HEADS])
def test_each_head_is_found(name: str) -> None:
    assert type(output_head(model_of(name))) is (HEADS[name][1] if name in HEADS else ProductHead)


def test_a_bias_that_is_still_zero_is_found_and_learns() -> None:
    model = model_of("a bias")
    torch.nn.init.zeros_(model.get_output_embeddings().bias)
    LanguageModelObjective(model)(padded_batch()).backward()
    assert isinstance(output_head(model), OwnHead)
    assert model.get_output_embeddings().bias.grad.abs().sum() > 0


def test_a_head_of_its_own_never_makes_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of("a bias"), []
    output_head(model)
    monkeypatch.setattr(heads, "logit_rows", lambda device, dtype: 4)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[-2]))
    objective = LanguageModelObjective(model)
    objective(padded_batch()).backward()
    assert max(rows) == 4 and sum(rows) == 2 * (sum(LENGTHS) - len(LENGTHS))  # once for the loss, once for its gradient


@pytest.mark.parametrize("name", ["a bias", "llama"])
def test_preferences_are_learned_through_any_head(name: str) -> None:
    model, ids = model_of(name), torch.randint(3, 96, (1, 2, 8))
    batch = {"input_ids": ids, "labels": ids.clone(), "reference": torch.zeros(1, 2)}
    batch["labels"][..., :3] = IGNORED
    loss = PreferenceObjective(model, PreferenceLossConfig("simpo"))(batch)[0]
    logits = model(input_ids=ids[0], use_cache=False).logits[:, 2:-1].log_softmax(dim=-1)
    means = logits.gather(2, ids[0, :, 3:, None]).mean(dim=(1, 2))
    expected = -torch.nn.functional.logsigmoid(0.1 * (means[0] - means[1]) - 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIX_DOCUMENTS)
def test_models_that_mix_documents_are_told(name: str) -> None:
    assert not keeps_documents_apart(model_of(name))


def test_where_attention_is_still_zero_documents_are_not_taken_to_be_apart() -> None:
    model = model_of("llama")
    for layer in model.get_decoder().layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not keeps_documents_apart(model)


def test_an_encoder_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(BertConfig(**SHAPE))
    with pytest.raises(UserError, match="a token sees those after it, as in an encoder: choose a causal"):
        require_causal("some/bert", model)
