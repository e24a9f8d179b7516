"""Networks of other blocks than GPT-2's: each computes what a stock class of transformers does, in every way."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.model.shapes import NETWORK_FIELDS
from tests.support.tiny_network import (
    CONTEXT,
    EVERY_NETWORK,
    MODERN,
    VOCABULARY,
    packed,
    padded,
    random_ids,
    stock_twin,
    tiny_config,
    tiny_model,
)

# Every switch alone, on GPT-2's other blocks; `MODERN` has them together.
SWITCHES: dict[str, dict[str, Any]] = {
    "rope": {"position_embedding": "rope"},
    "rmsnorm": {"norm": "rmsnorm"},
    "weightless norms": {"norm_elementwise_affine": False},
    "biasless norms": {"norm_bias": False},
    "embedding norm": {"embedding_norm": True},
    "qk norm": {"qk_norm": True},
    "gated": {"mlp": "gated", "hidden_act": "gelu"},
    "relu2": {"hidden_act": "relu2"},
    "grouped queries": {"num_key_value_heads": 1},
    "head size": {"head_dim": 10},
    "untied": {"tie_word_embeddings": False},
    "softcap": {"final_logit_softcapping": 1.5},
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(params=MODERN)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# The arithmetic of the stock classes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_stock_class_s(name: str, attention: str) -> None:
    model = tiny_model(**MODERN[name], attn_implementation=attention)
    twin = stock_twin(model, name)
    ids, mask, positions = padded("left")
    close(model(ids).logits, twin(ids).logits)
    ours, theirs = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (model, twin))
    close(ours[mask == 1], theirs[mask == 1])


def test_cached_steps_equal_the_stock_class_s(name: str) -> None:
    model = tiny_model(**MODERN[name])
    twin = stock_twin(model, name)
    ids = random_ids(2, 20)

    def in_steps(network: nn.Module, past: Any) -> torch.Tensor:
        pieces = ids.split([9, 1, 1, 5, 4], dim=1)
        return torch.cat([network(piece, past_key_values=past).logits for piece in pieces], dim=1)

    with torch.no_grad():
        expected = in_steps(twin, DynamicCache(config=twin.config))
        close(in_steps(model, DynamicCache(config=model.config)), expected)
        close(in_steps(model, StaticCache(model.config, max_cache_len=CONTEXT)), expected)
        close(model(ids).logits, expected)


def test_loss_and_gradients_equal_the_stock_class_s(name: str) -> None:
    model = tiny_model(**MODERN[name]).train()
    twin = stock_twin(model, name).train()
    ids = random_ids(2, 20)
    for network in (model, twin):
        network(ids, labels=ids).loss.backward()
    ours = {weight: parameter.grad for weight, parameter in model.named_parameters()}
    theirs = {weight: parameter.grad for weight, parameter in twin.named_parameters()}
    for weight in ours.keys() & theirs.keys():
        if name == "nanochat" and ("q_proj" in weight or "k_proj" in weight):
            continue  # the halves of its heads lie the other way round
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_rotary_positions_are_those_of_transformers(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 300.0, "factor": 2.0}
    if rope_type == "yarn":
        rope |= {"original_max_position_embeddings": CONTEXT // 2}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": CONTEXT // 2}
    model = tiny_model(**MODERN["qwen3"] | {"rope_parameters": rope})
    ids = random_ids(1, CONTEXT)
    close(model(ids).logits, stock_twin(model, "qwen3")(ids).logits)


# What the default can do


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_changes_the_logits_and_keeps_cache_padding_and_packing(switch: str) -> None:
    model = tiny_model(**SWITCHES[switch])
    ids, mask, positions = padded("left")
    whole = model(ids).logits
    assert whole.isfinite().all()
    past = DynamicCache(config=model.config)
    close(torch.cat([model(piece, past_key_values=past).logits for piece in ids.split([7, 1, 4], dim=1)], 1), whole)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    close(together[0, mask[0] == 1], model(ids[:1, mask[0] == 1]).logits[0])
    documents = [model(document).logits for document in ids.split([5, 7], dim=1)]
    close(model(ids, position_ids=packed(5, 7)).logits, torch.cat(documents, dim=1))


def test_no_two_switches_name_the_same_network() -> None:
    logits = [tiny_model(**changes)(random_ids(1, 9)).logits for changes in ({}, *SWITCHES.values())]
    for index, first in enumerate(logits):
        assert not any(torch.allclose(first, second, atol=1e-3) for second in logits[:index])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_a_packed_row_equals_its_documents_one_by_one(name: str, attention: str) -> None:
    model = tiny_model(**MODERN[name])
    ids = random_ids(2, 20)
    documents = [model(document).logits for document in ids.split([7, 1, 12], dim=1)]
    model.set_attn_implementation(attention)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        close(model(ids, position_ids=packed(7, 1, 12)).logits, torch.cat(documents, dim=1))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_text_is_the_stock_class_s_with_any_cache(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(**MODERN[name])
    ids, mask, _ = padded("left")
    greedy: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    expected = stock_twin(model, name).generate(ids, **greedy)
    assert torch.equal(model.generate(ids, **greedy), expected)
    assert torch.equal(model.generate(ids, **greedy, **options), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("network", EVERY_NETWORK)
def test_gradient_checkpointing_keeps_the_gradients(network: str, reentrant: bool) -> None:
    plain, checkpointed = (tiny_model(**EVERY_NETWORK[network]).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.is_activation_checkpointing
    ids, positions = random_ids(2, 16), packed(9, 7)
    for model in (plain, checkpointed):
        model(ids, position_ids=positions, labels=ids).loss.backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_it_compiles_as_one_graph(name: str) -> None:
    model = tiny_model(**MODERN[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, positions = random_ids(2, 20), packed(8, 12)
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        torch.testing.assert_close(compiled(ids, position_ids=positions).logits, expected)


def test_queries_keys_and_values_have_one_type_under_autocast(name: str) -> None:
    model = tiny_model(**MODERN[name])
    types = set()
    projection = model.get_submodule("model.layers.0.self_attn.o_proj")
    projection.register_forward_pre_hook(lambda module, inputs: types.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        past = model(random_ids(2, 9)).past_key_values
    assert types == {past.layers[0].keys.dtype, past.layers[0].values.dtype} == {torch.bfloat16}


def test_every_rule_of_every_plan_names_a_module(name: str) -> None:
    model = tiny_model(**MODERN[name])
    modules = {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()
    }
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        assert plan.keys() <= modules
    divided = {rule.rpartition(".")[2] for rule in model.tp_plan}
    linear = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear <= divided


# The start


def test_zero_initialized_residuals_leave_the_embeddings_alone_and_all_other_weights_as_they_were() -> None:
    models = []
    for zero in (False, True):
        torch.manual_seed(0)
        models.append(FGPTForCausalLM(tiny_config(**MODERN["qwen3"], zero_init_residual=zero)).eval())
    plain, zeroed = models
    for (weight, ours), theirs in zip(zeroed.named_parameters(), plain.parameters(), strict=True):
        if weight.endswith(("o_proj.weight", "down_proj.weight")):
            assert not ours.any() and theirs.any()
        else:
            assert torch.equal(ours, theirs)
    ids = random_ids(1, 9)
    embeddings = zeroed.get_input_embeddings()(ids)
    close(zeroed.model(ids).last_hidden_state, zeroed.model.norm(embeddings))


# The context


def test_rotary_positions_let_the_context_grow_after_training(tmp_path: Any) -> None:
    model = tiny_model(**MODERN["qwen3"])
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 2 * CONTEXT)
    with pytest.raises(ValueError, match="longer than the context"):
        model(ids)
    longer = FGPTForCausalLM.from_pretrained(tmp_path, max_position_embeddings=2 * CONTEXT)
    logits = longer(ids).logits
    assert logits.shape == (1, 2 * CONTEXT, VOCABULARY)
    close(logits[:, :CONTEXT], model(ids[:, :CONTEXT]).logits)
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 1.5, "original_max_position_embeddings": CONTEXT}
    with pytest.raises(ValueError, match="max_position_embeddings=96 is longer than the 72 tokens that rope_param"):
        FGPTForCausalLM.from_pretrained(tmp_path, max_position_embeddings=2 * CONTEXT, rope_parameters=yarn)


# Settings


@pytest.mark.parametrize("network", EVERY_NETWORK)
def test_a_saved_network_loads_as_it_was(network: str, tmp_path: Any) -> None:
    model = tiny_model(**EVERY_NETWORK[network])
    model.save_pretrained(tmp_path)
    loaded = FGPTForCausalLM.from_pretrained(tmp_path)
    for field in NETWORK_FIELDS:
        assert getattr(loaded.config, field) == getattr(model.config, field)
    ids = random_ids(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_gated_mlp_has_as_many_parameters_as_a_plain_one_up_to_rounding() -> None:
    plain, gated = (FGPTConfig(hidden_size=768, num_attention_heads=12, mlp=mlp) for mlp in ("plain", "gated"))
    assert (plain.intermediate_size, gated.intermediate_size) == (3072, 2048)
    assert FGPTConfig(hidden_size=256, num_attention_heads=4, mlp="gated").intermediate_size == 704


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": "batchnorm"}, "norm='batchnorm' is unknown; choose from layernorm, rmsnorm"),
        ({"mlp": "mixture"}, "mlp='mixture' is unknown; choose from plain, gated"),
        ({"position_embedding": "alibi"}, "position_embedding='alibi' is unknown; choose from learned, rope"),
        ({"hidden_act": "swiglu"}, "hidden_act='swiglu' is hidden_act='silu' with mlp='gated'"),
        ({"position_embedding": "rope", "head_dim": 27}, "head_dim=27 must be even"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must divide num_attention_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping=0 must be above zero"),
        ({"norm": "rmsnorm", "norm_bias": True}, "norm_bias=true needs norm='layernorm'"),
        ({"norm_elementwise_affine": False, "norm_bias": True}, "norm_bias=true needs .*norm_elementwise_affine=true"),
        ({"rope_parameters": {"rope_theta": 500.0}}, "rope_parameters=.* need position_embedding='rope'"),
        ({"rope_theta": 500.0}, "rope_parameters=.* need position_embedding='rope'"),
        ({"position_embedding": "rope", "rope_theta": 0}, "rope_theta=0 must be a number above zero"),
        ({"position_embedding": "rope", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        (
            {"position_embedding": "rope", "rope_parameters": {"rope_type": "spiral"}},
            "rope_type='spiral' is unknown; choose from default, linear",
        ),
        (
            {"position_embedding": "rope", "rope_parameters": {"rope_type": "yarn"}},
            "do not describe rope_type='yarn': .*'factor'",
        ),
        (
            {
                "position_embedding": "rope",
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20},
            },
            "max_position_embeddings=48 is longer than the 40 tokens that rope_parameters scale to: factor=2.0 times",
        ),
    ],
)
def test_a_network_that_cannot_be_is_a_value_error_with_its_reason(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FGPTForCausalLM(tiny_config(**given))
