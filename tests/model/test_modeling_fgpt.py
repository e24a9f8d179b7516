"""The network: GPT-2's arithmetic, proven against transformers' GPT2LMHeadModel, and its manners as a model there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    TrainerCallback,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fgpt_hf.model import modeling_fgpt
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM, FGPTModel, eager_attention_forward

VOCABULARY, CONTEXT = 96, 48
PAD = 2


def tiny_config(**changes) -> FGPTConfig:
    """Give the shape of a network of two layers that reads 48 tokens."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    return FGPTConfig(**shape | changes)


def tiny_model(model_class: type = FGPTForCausalLM, **changes) -> FGPTForCausalLM:
    """Give a model in evaluation mode in which every weight and bias matters."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def gpt2_names(model: FGPTForCausalLM, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arrange tensors shaped as FGPT's parameters under GPT-2's names and in its shapes."""
    named = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.wpe.weight": tensors["model.embed_positions.weight"],
    }
    for kind in ("weight", "bias"):
        named[f"transformer.ln_f.{kind}"] = tensors[f"model.norm.{kind}"]
        for index in range(model.config.num_hidden_layers):
            ours, theirs = f"model.layers.{index}", f"transformer.h.{index}"
            qkv = torch.cat([tensors[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"])
            named[f"{theirs}.attn.c_attn.{kind}"] = qkv.T if kind == "weight" else qkv
            for mine, its in (
                ("self_attn.o_proj", "attn.c_proj"),
                ("mlp.up_proj", "mlp.c_fc"),
                ("mlp.down_proj", "mlp.c_proj"),
            ):
                tensor = tensors[f"{ours}.{mine}.{kind}"]
                named[f"{theirs}.{its}.{kind}"] = tensor.T if kind == "weight" else tensor
            named[f"{theirs}.ln_1.{kind}"] = tensors[f"{ours}.input_layernorm.{kind}"]
            named[f"{theirs}.ln_2.{kind}"] = tensors[f"{ours}.post_attention_layernorm.{kind}"]
    return named


def gpt2_twin(model: FGPTForCausalLM) -> GPT2LMHeadModel:
    """Give transformers' GPT-2 with the weights of an FGPT."""
    config = model.config
    shape = {name: getattr(config, name) for name in config.attribute_map}
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": PAD}
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **shape, **special)).eval()
    loaded = twin.load_state_dict(gpt2_names(model, dict(model.named_parameters())), strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys
    twin.tie_weights()
    return twin


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give ids, mask and positions of three rows, two of them padded on a side."""
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, pads in enumerate((5, 0, 2)):
        mask[row, slice(0, pads) if side == "left" else slice(12 - pads, 12)] = 0
    return ids.masked_fill(mask == 0, PAD), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def packed(*lengths: int) -> torch.Tensor:
    """Give the positions (1, T) of documents that share a row."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


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


# Generation


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_text_is_the_same_with_any_cache_and_without(options: dict) -> None:
    model = tiny_model()
    ids = random_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert expected.shape == (2, 36)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **options), expected)
    assert torch.equal(gpt2_twin(model).generate(ids, max_new_tokens=30, do_sample=False), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(options: dict) -> None:
    model = tiny_model()
    ids, mask, _ = padded("left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
    for row in range(3):
        alone = model.generate(ids[row, mask[row] == 1].unsqueeze(0), max_new_tokens=12, do_sample=False)
        assert torch.equal(together[row, -12:], alone[0, -12:])


def test_beam_search_and_prompt_lookup_run() -> None:
    model = tiny_model()
    ids = random_ids(1, 6)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), greedy)
    assert model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False).shape == (1, 18)


def test_continuous_batching_generates_what_each_prompt_generates_alone() -> None:
    model = tiny_model()
    prompts = [random_ids(1, length)[0].tolist() for length in (7, 3, 12)]
    # Batching needs an end of text to wait for: -1 never comes.
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    answers = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


# The context


def test_a_sequence_past_the_context_is_a_value_error_naming_both_lengths() -> None:
    model = tiny_model()
    too_long = random_ids(1, CONTEXT + 1)
    message = f"{CONTEXT + 1} tokens is longer than the context of {CONTEXT}"
    for given in ({"input_ids": too_long}, {"inputs_embeds": model.get_input_embeddings()(too_long)}):
        with pytest.raises(ValueError, match=message):
            model(**given)
    with pytest.raises(ValueError, match=message):
        model(too_long, position_ids=packed(CONTEXT + 1))
    with pytest.raises(ValueError, match=message):
        model(too_long[:, :4], position_ids=torch.arange(CONTEXT - 3, CONTEXT + 1).unsqueeze(0))


def test_a_cache_past_the_context_is_a_value_error_naming_both_lengths() -> None:
    model = tiny_model()
    message = f"{CONTEXT + 1} tokens is longer than the context of {CONTEXT}"
    past = model(random_ids(1, CONTEXT)).past_key_values
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 1), past_key_values=past)
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 1), past_key_values=StaticCache(model.config, max_cache_len=CONTEXT + 1))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_fills_the_context_and_no_more(options: dict) -> None:
    model = tiny_model()
    ids = random_ids(1, 40)
    assert model.generate(ids, max_length=CONTEXT + 1, do_sample=False, **options).shape == (1, CONTEXT + 1)
    with pytest.raises(ValueError, match=f"longer than the context of {CONTEXT}"):
        model.generate(ids, max_length=CONTEXT + 2, do_sample=False, **options)


def test_the_context_is_guarded_without_reading_from_the_device() -> None:
    with torch.device("meta"):  # where any value read is an error
        model = FGPTForCausalLM(tiny_config()).eval()
        ids = torch.zeros(1, 4, dtype=torch.long)
        past = StaticCache(model.config, max_cache_len=CONTEXT)
        assert model(ids, past_key_values=past, position_ids=ids).logits.shape == (1, 4, VOCABULARY)
        with pytest.raises(ValueError, match="longer than the context"):
            model(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


@pytest.mark.parametrize("given", [{}, {"input_ids": random_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 48)}])
def test_exactly_one_kind_of_input_must_be_given(given: dict) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model()(**given)


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(reentrant: bool) -> None:
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.is_activation_checkpointing
    ids, positions = random_ids(2, 16), packed(9, 7)
    for model in (plain, checkpointed):
        model(ids, position_ids=positions, labels=ids).loss.backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
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

        def on_log(self, args, state, control, logs, **kwargs) -> None:
            self.values += [logs["loss"]] if "loss" in logs else []

    rows = [{"input_ids": ids, "labels": ids, "position_ids": packed(6, 6)[0]} for ids in random_ids(8, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )
    Trainer(tiny_model(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Losses()]).train()
    assert Losses.values[-1] < Losses.values[0] - 0.5


# The attention interface


def test_every_attention_function_gives_the_same_logits() -> None:
    model = tiny_model()
    ids, mask, positions = padded("left")
    for given in ({}, {"attention_mask": mask, "position_ids": positions}):
        logits = {}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for attention in ("eager", "sdpa", "flex_attention"):
                model.set_attn_implementation(attention)
                logits[attention] = model(ids, **given).logits[mask == 1]
        torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits["flex_attention"], logits["eager"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_head_size_that_fused_kernels_lack_is_padded_where_they_are(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flagship's is 54, and kernels on GPUs take multiples of 8; here the CPU is made to count as a GPU."""
    model = tiny_model(hidden_size=108, num_attention_heads=2)
    model.set_attn_implementation(attention)
    ids, positions = random_ids(2, 20), packed(8, 12)
    expected = model(ids, position_ids=positions).logits
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    written = model.generate(ids, max_new_tokens=4, do_sample=False)

    head_sizes = []
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping,
        attention,
        lambda module, query, *rest, **kwargs: (
            head_sizes.append((query.shape[2], query.shape[3])) or plain(module, query, *rest, **kwargs)
        ),
    )
    monkeypatch.setattr(modeling_fgpt, "PADDED_DEVICES", ("cpu",))
    model.zero_grad()
    logits = model(ids, position_ids=positions).logits
    logits.sum().backward()
    assert set(head_sizes) == {(20, 56)}
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
    assert (1, 54) in head_sizes  # a token at a time, not worth a copy of the cache


@pytest.mark.slow
def test_compiled_flex_attention_gives_the_same_logits() -> None:
    model = tiny_model()
    ids, positions = random_ids(2, 20), packed(8, 12)
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)


def test_flash_attention_is_told_where_the_documents_of_all_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen(module, query, key, value, attention_mask, scaling, **kwargs):
        """Attend within the bounds alone, as the kernel does over flattened rows."""
        assert attention_mask is None and module.is_causal
        rows, tokens = query.shape[0], query.shape[2]
        query, key, value = (part.transpose(1, 2).flatten(0, 1).transpose(0, 1) for part in (query, key, value))
        bounds = kwargs["cu_seq_lens_q"].tolist()
        assert bounds == kwargs["cu_seq_lens_k"].tolist() and kwargs["max_length_q"] == kwargs["max_length_k"] == 12
        spans = [slice(*span) for span in zip(bounds, bounds[1:], strict=False)]
        attended = [
            nn.functional.scaled_dot_product_attention(
                query[None, :, span], key[None, :, span], value[None, :, span], is_causal=True, scale=scaling
            )
            for span in spans
        ]
        return torch.cat(attended, dim=2)[0].transpose(0, 1).unflatten(0, (rows, tokens)), None

    model = tiny_model()
    assert model._supports_flash_attn
    ids, positions = random_ids(2, 20), packed(8, 12)
    expected = model(ids, position_ids=positions).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", varlen)
    assert "flash_attention_2" in ALL_MASK_ATTENTION_FUNCTIONS
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)


def test_hidden_states_and_attentions_can_be_recorded() -> None:
    model = tiny_model(attn_implementation="eager")
    outputs = model(random_ids(2, 5), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(2, 5, 48)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(2, 3, 5, 5)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 3, 5))


# Compiling


def test_it_compiles_as_one_graph() -> None:
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, positions = random_ids(2, 20), packed(8, 12)
    with torch.no_grad():
        for given in ({}, {"position_ids": positions}):
            torch.testing.assert_close(compiled(ids, **given).logits, model(ids, **given).logits)
        assert compiled.get_input_embeddings().weight is compiled.lm_head.weight
        # torch wraps what is raised in a single graph, and quotes it.
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"longer than the context of {CONTEXT}"):
            compiled(random_ids(1, CONTEXT + 1))


def test_compiled_steps_over_a_static_cache_equal_the_uncompiled_ones() -> None:
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(1, 10)
    with torch.no_grad():
        past = StaticCache(model.config, max_cache_len=CONTEXT)
        model(ids[:, :5], past_key_values=past)
        steps = [compiled(ids[:, at : at + 1], past_key_values=past).logits for at in range(5, 10)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits[:, 5:], rtol=0, atol=1e-5)


def test_a_compiled_training_step_without_packing_needs_no_mask() -> None:
    masks = []

    def record(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        calls = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
        masks.extend(node.kwargs.get("attn_mask") for node in calls)
        return graph

    model = tiny_model().train()
    ids = random_ids(2, 20)
    torch.compile(model, fullgraph=True, backend=record)(ids, labels=ids)
    assert masks == [None, None]


def test_it_can_be_exported() -> None:
    model = tiny_model()
    ids = random_ids(2, 12)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, model(ids).logits)


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

folder, size = sys.argv[1:]
torch.set_num_threads(1)
whole = FGPTForCausalLM.from_pretrained(folder).eval()
shared = FGPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{size: 2})).eval()
ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[0, :4] = 0
with torch.no_grad():
    torch.testing.assert_close(shared(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False)
assert torch.equal(shared.generate(ids, **options), whole.generate(ids, **options))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tp_size", "pp_size", "fsdp_size"])
def test_two_processes_share_a_model_by_its_plans(size: str, tmp_path: Path) -> None:
    tiny_model(num_attention_heads=4).save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "run.py"), str(tmp_path / "model"), size]
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
    "residual": new.model.layers[0].mlp.down_proj.weight.std().item(),
}))
"""


def test_a_stranger_loads_and_runs_a_saved_folder_by_its_own_code(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "stranger.py").write_text(STRANGER)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "stranger.py", str(tmp_path / "model"), str(tmp_path / "again")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["types"] == ["FGPTConfig", "FGPTModel", "FGPTForCausalLM", "FGPTForCausalLM"]
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert report["texts"] == [expected, expected]
    assert report["tied"]
    assert report["residual"] == pytest.approx(0.02 / 4**0.5, rel=0.05)
    for name in ("configuration_fgpt.py", "modeling_fgpt.py"):  # a stranger's copy is as complete as the first
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


def test_the_auto_class_gives_the_model_for_its_config() -> None:
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is FGPTForCausalLM
