"""Weights of other programs: each layout gives the logits of the arithmetic that it was trained in."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from transformers import GPT2Config, GPT2LMHeadModel

from fgpt_hf.convert.layouts import ConvertedWeights, from_checkpoint, from_gpt2, pad_vocabulary
from fgpt_hf.convert.stock import to_stock
from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from tests.support.tiny_network import random_ids

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 96, 48, 2, 24, 32


def checkpoint(layout: str) -> dict[str, Tensor]:
    """Random weights under a layout's names, `nanogpt` with all its biases and `nanogpt-without-biases` with none."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + 0.2 * torch.randn(shape, generator=generator)

    state = {"transformer.wte.weight": draw(VOCABULARY, WIDTH), "transformer.wpe.weight": draw(CONTEXT, WIDTH)}
    state |= {"transformer.ln_f.weight": draw(WIDTH, mean=1.0), "transformer.ln_f.bias": draw(WIDTH)}
    for index in range(LAYERS):
        layer = {
            "ln_1.weight": draw(WIDTH, mean=1.0),
            "ln_1.bias": draw(WIDTH),
            "ln_2.weight": draw(WIDTH, mean=1.0),
            "ln_2.bias": draw(WIDTH),
            "attn.c_attn.weight": draw(3 * WIDTH, WIDTH),
            "attn.c_attn.bias": draw(3 * WIDTH),
            "attn.c_proj.weight": draw(WIDTH, WIDTH),
            "attn.c_proj.bias": draw(WIDTH),
            "mlp.c_fc.weight": draw(4 * WIDTH, WIDTH),
            "mlp.c_fc.bias": draw(4 * WIDTH),
            "mlp.c_proj.weight": draw(WIDTH, 4 * WIDTH),
            "mlp.c_proj.bias": draw(WIDTH),
        }
        if layout == "original-2025":
            layer["attn.attn.in_proj_weight"] = layer.pop("attn.c_attn.weight")
            layer["attn.attn.in_proj_bias"] = layer.pop("attn.c_attn.bias")
            layer |= {"attn.attn.out_proj.weight": draw(WIDTH, WIDTH), "attn.attn.out_proj.bias": draw(WIDTH)}
        if layout == "original-2026":
            del layer["attn.c_attn.bias"], layer["attn.c_proj.bias"]
        state |= {f"transformer.h.{index}.{name}": tensor for name, tensor in layer.items()}
    if layout == "nanogpt-without-biases":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("bias")}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def restated(state: dict[str, Tensor], ids: Tensor, heads: int = HEADS) -> Tensor:
    """The logits (B, T, V) as the program that wrote the weights computed them, in float64."""
    weights = {name: tensor.double() for name, tensor in state.items()}

    def normed(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def linear(x: Tensor, name: str, mark: str = ".") -> Tensor:
        return x @ weights[f"{name}{mark}weight"].T + weights.get(f"{name}{mark}bias", torch.zeros(()))

    def attend(qkv: Tensor) -> Tensor:
        rows, tokens, _ = qkv.shape
        query, key, value = (part.view(rows, tokens, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).masked_fill(future, -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, tokens, -1)

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: ids.shape[1]]
    for index in range(LAYERS):
        layer = f"transformer.h.{index}"
        inputs = normed(x, f"{layer}.ln_1")
        if f"{layer}.attn.attn.in_proj_weight" in weights:
            attended = attend(linear(inputs, f"{layer}.attn.attn.in_proj", mark="_"))
            attended = linear(attended, f"{layer}.attn.attn.out_proj")
        else:
            attended = attend(linear(inputs, f"{layer}.attn.c_attn"))
        x = x + linear(attended, f"{layer}.attn.c_proj")
        hidden = gelu(linear(normed(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"))
        x = x + linear(hidden, f"{layer}.mlp.c_proj")
    return normed(x, "transformer.ln_f") @ weights["lm_head.weight"].T


def network(found: ConvertedWeights) -> FGPTForCausalLM:
    model = FGPTForCausalLM(found.config).eval()
    model.load_state_dict(found.weights)
    return model


LAYOUTS = ["original-2025", "original-2026", "nanogpt", "nanogpt-without-biases"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_logits_and_the_text_of_the_original_arithmetic(layout: str) -> None:
    state, ids = checkpoint(layout), random_ids(3, CONTEXT)
    record = {"model_args": {"n_head": HEADS}} if layout.startswith("nanogpt") else {}
    found = from_checkpoint({"model": state, **record})
    model = network(found)
    assert layout.startswith(found.layout)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, restated(state, ids).float(), rtol=0, atol=1e-5)
        written = model.generate(ids[:, :4], max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = ids[:, :4]
    for _ in range(12):
        expected = torch.cat([expected, restated(state, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "model_state_dict", "model"])
def test_weights_are_found_wherever_a_program_puts_them(layout: str, prefix: str, key: str | None) -> None:
    state = {prefix + name: tensor for name, tensor in checkpoint(layout).items()}
    expected = from_checkpoint(checkpoint(layout)).weights
    found = from_checkpoint({key: state, "step": 7, "optimizer": {}} if key else state)
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], expected[name]) for name in expected)


def test_the_causal_masks_that_old_versions_stored_are_left_out() -> None:
    state = checkpoint("nanogpt")
    masks = {f"transformer.h.{index}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT) for index in range(LAYERS)}
    assert from_checkpoint(state | masks).weights.keys() == from_checkpoint(state).weights.keys()


def test_two_projections_are_folded_in_float64() -> None:
    state = checkpoint("original-2025")
    attention = "transformer.h.0.attn"
    outer, inner = state[f"{attention}.c_proj.weight"].double(), state[f"{attention}.attn.out_proj.weight"].double()
    folded = from_checkpoint(state).weights["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(folded, (outer @ inner).float())


def test_an_untied_head_stays_untied() -> None:
    state = checkpoint("nanogpt") | {"lm_head.weight": 0.2 * torch.randn(VOCABULARY, WIDTH)}
    model, ids = network(from_checkpoint(state)), random_ids(2, 9)
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model(ids).logits, restated(state, ids).float(), rtol=0, atol=1e-5)


def test_gpt2_in_and_out_are_inverse_with_equal_logits() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": 3,
        "n_positions": CONTEXT,
    }
    theirs = GPT2LMHeadModel(GPT2Config(**shape, n_inner=100, layer_norm_epsilon=1e-6)).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.2)
    found = from_gpt2(theirs.config, theirs.state_dict())
    ours, ids = network(found), random_ids(3, CONTEXT)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    again = to_stock(ours)
    config, state = again.config, again.state_dict()
    original = theirs.state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert {
        name: getattr(config, name) for name in (*shape, "n_inner", "layer_norm_epsilon", "activation_function")
    } == {
        **shape,
        "n_inner": 100,
        "layer_norm_epsilon": 1e-6,
        "activation_function": "gelu_new",
    }


@pytest.mark.parametrize("changes", [{"attention_bias": False}, {"mlp_bias": False}, {"hidden_act": "gelu"}])
def test_what_gpt2_has_and_a_model_lacks_becomes_zeros(changes: dict) -> None:
    torch.manual_seed(0)
    config = FGPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=3, **changes
    )
    model, ids = FGPTForCausalLM(config).eval(), random_ids(2, 9)
    torch.testing.assert_close(to_stock(model)(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_padded_vocabulary_changes_no_logit_and_is_never_the_likeliest() -> None:
    found = from_checkpoint(checkpoint("original-2026"))
    larger, ids = pad_vocabulary(found, VOCABULARY + 7), random_ids(4, CONTEXT)
    logits = network(larger)(ids).logits
    torch.testing.assert_close(logits[..., :VOCABULARY], network(found)(ids).logits, rtol=0, atol=1e-5)
    assert (logits.argmax(-1) < VOCABULARY).all()
    assert larger.config.vocab_size == logits.shape[-1] == VOCABULARY + 7


# Bad input


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True)],
)
def test_a_gpt2_that_fgpt_cannot_express_is_refused_by_its_field(field: str, value: bool) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=3, **{field: value})
    with pytest.raises(UserError, match=f"{field}={value} is a feature that FGPT lacks: it needs {not value}"):
        from_gpt2(config, {})


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({}, "found nothing"),
        ({"conv.weight": torch.ones(1)}, "found conv.weight"),
        ({"epoch": 3}, "found epoch"),
        (
            checkpoint("original-2026") | {"transformer.h.0.attn.k.weight": torch.ones(1)},
            "transformer.h.N.attn.k.weight",
        ),
        (
            {k: v for k, v in checkpoint("original-2026").items() if "h.1.ln_2" not in k},
            "not every one of them in every",
        ),
    ],
)
def test_an_unknown_layout_is_refused_with_the_keys_expected_and_found(state: dict, found: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_checkpoint(state)
    assert "unknown layout: expected transformer.h.N.attn.c_attn.weight" in str(refusal.value)
    assert found in str(refusal.value)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UserError, match="hidden_size=48 must divide evenly among num_attention_heads=7"):
        from_checkpoint(checkpoint("original-2025"), num_attention_heads=7)


def test_shapes_that_do_not_fit_together_are_refused_by_name() -> None:
    state = checkpoint("original-2026") | {"transformer.h.1.mlp.c_proj.weight": torch.ones(WIDTH, 7)}
    expected = r"model.layers.1.mlp.down_proj.weight should be \(48, 192\) and is \(48, 7\)"
    with pytest.raises(UserError, match=expected):
        from_checkpoint(state)


def test_a_vocabulary_cannot_shrink() -> None:
    with pytest.raises(UserError, match="vocab_size=95 is too small: the weights have 96 tokens"):
        pad_vocabulary(from_checkpoint(checkpoint("nanogpt")), VOCABULARY - 1)


ODD = [
    *(torch.ones(shape) for shape in ((), (3,), (0,), (0, 0), (2, 2), (48, 96), (144, 48, 2))),
    *(torch.ones(WIDTH, WIDTH).to(dtype) for dtype in (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn)),
    torch.ones(WIDTH, WIDTH).to_sparse(),
    torch.empty(WIDTH, WIDTH, device="meta"),
]


@pytest.mark.parametrize("layout", ["original-2025", "original-2026", "nanogpt"])
def test_a_weight_of_any_other_type_or_shape_is_one_clear_line(layout: str) -> None:
    state = checkpoint(layout)
    names = [name for name in state if ".h.1." not in name]
    for name in names:
        for odd in ODD:
            with pytest.raises(UserError, match="do not fit together|should hold floating-point|heads|at least 1"):
                from_checkpoint({"model": state | {name: odd}})


@pytest.mark.parametrize("recorded", [{"n_head": "x"}, {"n_head": -1}, {"n_head": 2.5}, {"n_head": 10**30}])
def test_heads_that_no_network_has_are_one_clear_line(recorded: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="num_attention_heads"):
        from_checkpoint({"model": checkpoint("nanogpt"), "model_args": recorded})


def test_layers_that_do_not_begin_at_zero_are_refused() -> None:
    state = {name.replace(".h.0.", ".h.7."): weight for name, weight in checkpoint("nanogpt").items()}
    with pytest.raises(UserError, match="unknown layout: .* not every one of them in every layer from 0 on"):
        from_checkpoint({"model": state, "model_args": {}})
