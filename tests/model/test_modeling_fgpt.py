"""The network computes what transformers' GPT2LMHeadModel computes, and trains as GPT-2 does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache, TrainerCallback

from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from tests.support.tiny_network import (
    CONTEXT,
    gpt2_names,
    gpt2_twin,
    packed,
    padded,
    random_ids,
    tiny_config,
    tiny_model,
)

# The arithmetic: GPT-2's


def test_the_flagship_has_712_035_360_parameters() -> None:
    with torch.device("meta"):
        model = FGPTForCausalLM(FGPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 712_035_360


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_logits_equal_gpt2s(attention: str, activation: str) -> None:
    model = tiny_model(hidden_act=activation, attn_implementation=attention)
    twin = gpt2_twin(model)
    ids = random_ids(2, CONTEXT)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_gpt2s_on_padded_rows(side: str) -> None:
    model = tiny_model()
    twin = gpt2_twin(model)
    ids, mask, positions = padded(side)
    ours = model(ids, attention_mask=mask, position_ids=positions).logits
    theirs = twin(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-5)


def test_padding_does_not_change_a_rows_logits() -> None:
    model = tiny_model()
    for side in ("left", "right"):
        ids, mask, positions = padded(side)
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            alone = model(ids[row, mask[row] == 1].unsqueeze(0)).logits[0]
            torch.testing.assert_close(together[row, mask[row] == 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_steps_equal_gpt2s_and_one_pass_over_the_whole(cache: str) -> None:
    model = tiny_model()
    twin = gpt2_twin(model)
    ids = random_ids(2, 20)

    def in_steps(network: nn.Module) -> torch.Tensor:
        static = cache == "static"
        past = StaticCache(network.config, max_cache_len=CONTEXT) if static else DynamicCache(config=network.config)
        pieces = ids.split([9, 1, 1, 5, 4], dim=1)
        return torch.cat([network(piece, past_key_values=past).logits for piece in pieces], dim=1)

    with torch.no_grad():
        torch.testing.assert_close(in_steps(model), in_steps(twin), rtol=0, atol=1e-5)
        torch.testing.assert_close(in_steps(model), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_a_packed_row_equals_its_documents_one_by_one(attention: str, training: bool) -> None:
    if attention == "flex_attention" and training:
        pytest.skip("FlexAttention has no backward pass on the CPU")
    model = tiny_model()
    twin = gpt2_twin(model)
    model.set_attn_implementation(attention)
    model.train(training)
    lengths = (7, 1, 12)
    ids = random_ids(2, sum(lengths))
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(training):
        row = model(ids, position_ids=packed(*lengths)).logits
    documents = [twin(document).logits for document in ids.split(lengths, dim=1)]
    torch.testing.assert_close(row, torch.cat(documents, dim=1), rtol=0, atol=1e-5)


def test_packed_rows_may_be_longer_than_the_context() -> None:
    model = tiny_model()
    lengths = (CONTEXT, 10, CONTEXT)
    ids = random_ids(1, sum(lengths))
    row = model(ids, position_ids=packed(*lengths)).logits
    documents = [model(document).logits for document in ids.split(lengths, dim=1)]
    torch.testing.assert_close(row, torch.cat(documents, dim=1), rtol=0, atol=1e-5)


def test_loss_and_gradients_equal_gpt2s() -> None:
    model = tiny_model().train()
    twin = gpt2_twin(model).train()
    ids = random_ids(2, 20)
    labels = ids.masked_fill(torch.arange(20) < 4, -100)
    ours, theirs = model(ids, labels=labels), twin(ids, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, gradient in gpt2_names(model, gradients).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, at=name: at + text)


def test_biases_can_be_left_out() -> None:
    model = tiny_model(attention_bias=False, mlp_bias=False)
    biased = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert {name.rpartition(".")[2] for name in biased} == {"input_layernorm", "post_attention_layernorm", "norm"}
    assert model(random_ids(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rate", ["embedding_dropout", "residual_dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_alone(rate: str, attention: str) -> None:
    model = tiny_model(**{rate: 0.5}, attn_implementation=attention)
    ids = random_ids(1, 12)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(ids).logits, model(ids).logits)


# The start: GPT-2's initialisation


def test_weights_start_as_gpt2s_do() -> None:
    torch.manual_seed(0)
    layers = 8
    model = FGPTForCausalLM(tiny_config(hidden_size=192, num_hidden_layers=layers))
    residual = 0.02 / (2 * layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if "o_proj" in name or "down_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < expected / 20, name


# Training


def test_the_loss_is_the_sum_over_the_given_number_of_items() -> None:
    model = tiny_model()
    ids = random_ids(3, 10)
    labels = ids.masked_fill(torch.arange(10) < 3, -100)
    mean = model(ids, labels=labels).loss
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, mean * 21 / 7)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(21)).loss, mean)


def test_accumulated_losses_and_gradients_equal_the_whole_batchs() -> None:
    whole, parts = tiny_model().train(), tiny_model().train()
    ids = random_ids(4, 10)
    labels = ids.masked_fill(torch.arange(10) < torch.tensor([[0], [3], [6], [9]]), -100)
    items = (labels[:, 1:] != -100).sum()
    whole(ids, labels=labels).loss.backward()
    for rows in (slice(0, 1), slice(1, 4)):
        parts(ids[rows], labels=labels[rows], num_items_in_batch=items).loss.backward()
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


MASK = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]]).repeat(1, 2)


@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([0, 5]), torch.tensor([[1, 2], [8, 3]]), MASK])
def test_logits_to_keep_gives_the_asked_positions(keep: int | torch.Tensor) -> None:
    model = tiny_model()
    ids = random_ids(2, 10)
    every = model(ids).logits
    if isinstance(keep, int):
        expected = every[:, -keep:]
    elif keep is MASK:
        expected = every[MASK]
    else:
        expected = torch.stack([row[at] for row, at in zip(every, keep.expand(2, -1), strict=True)])
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


def test_the_trainer_trains_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Losses(TrainerCallback):
        values: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:  # type: ignore[override]
            self.values += [logs["loss"]] if "loss" in logs else []

    rows = [{"input_ids": ids, "labels": ids, "position_ids": packed(6, 6)[0]} for ids in random_ids(8, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )
    Trainer(tiny_model(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Losses()]).train()
    assert Losses.values[-1] < Losses.values[0] - 0.5
