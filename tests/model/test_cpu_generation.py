"""Fast layers and a growing cache write what `generate` writes; int8 keeps the loss; a timing chooses the format."""

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from fgpt_hf.model import cpu_generation
from fgpt_hf.model.cpu_generation import (
    Int8Linear,
    JointPart,
    OneDnnLinear,
    _replace_linears,
    available_formats,
    cache_options,
    formats_by_speed,
    loaded_dtype,
    plain_linear,
    prepare,
    text_loss,
    time_formats,
)
from tests.support.families import family_model
from tests.support.tiny_network import CONTEXT, PAD, random_ids, tiny_model

SETTINGS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
    {"do_sample": False, "eos_token_id": list(range(0, 96, 7))},
    {"do_sample": False, "num_beams": 3},
]
int8 = pytest.mark.skipif("int8" not in available_formats(), reason="needs oneDNN's int8 products")


def written(model: Any, prompt: torch.Tensor, grows: bool = True, **options: Any) -> list[int]:
    """The ids behind a prompt, up to the end of the context, with a seed."""
    torch.manual_seed(7)
    cache = cache_options(model) if grows else {}
    room = {"max_new_tokens": CONTEXT - prompt.shape[1], "pad_token_id": PAD}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **cache, **room, **options)
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("number_format", ["float32", "bfloat16"])
def test_a_model_that_reads_the_weights_of_its_layers_keeps_them(number_format: str) -> None:
    plain = family_model("mamba").to(loaded_dtype(number_format))
    model, prompt = deepcopy(plain), random_ids(1, 9)
    assert not prepare(deepcopy(plain), "int8")
    assert prepare(model, number_format)
    texts = [each.generate(prompt, max_new_tokens=9, do_sample=False) for each in (model, plain)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("number_format", ["float32", "bfloat16"])
def test_the_text_is_that_of_plain_generate(number_format: str, settings: dict[str, Any]) -> None:
    plain = tiny_model().to(loaded_dtype(number_format))
    fast = deepcopy(plain)
    assert prepare(fast, number_format)
    assert {type(layer) for layer in chain([fast.lm_head], fast.model.layers[0].mlp.children())} >= {OneDnnLinear}
    assert type(fast.model.layers[0].self_attn.k_proj) is JointPart
    prompt = random_ids(1, 9)
    assert written(fast, prompt, **settings) == written(plain, prompt, grows=False, **settings)


@int8
@pytest.mark.parametrize("settings", SETTINGS)
def test_int8_writes_the_same_with_any_cache_and_without(settings: dict[str, Any]) -> None:
    fast = tiny_model().bfloat16()
    prepare(fast, "int8")
    prompt = random_ids(1, 9)
    expected = written(fast, prompt, grows=False, use_cache=False, **settings)
    assert written(fast, prompt, **settings) == written(fast, prompt, grows=False, **settings) == expected


@int8
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_errs_by_less_than_a_step_of_its_weights_and_inputs(bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 5000, bias=bias)  # quantized in two parts
    states = torch.randn(2, 3, 256)
    states[0, 1] = 0  # a token without anything in it
    fast = Int8Linear(plain.weight.detach(), plain.bias.detach() if bias else None)
    expected = plain(states)
    assert (fast(states) - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(fast(states)[1, 2], fast(states[1, 2]))  # no other token counts


@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_one_input_share_a_product_and_others_get_what_is_theirs(bias: bool) -> None:
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj")
    plain = torch.nn.ModuleDict(
        {name: torch.nn.Linear(16, size, bias=bias) for name, size in zip(names, (16, 8, 8), strict=True)}
    )
    fast: Any = deepcopy(plain)
    _replace_linears(fast, plain_linear)
    one, other = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    calls: list[torch.Tensor] = []
    fast["q_proj"].joint._layer.register_forward_hook(lambda *a: calls.append(a[1][0]))
    for states in ((one, one, one), (one, other, other), (one, one, other), (other, other, other)):
        for name, given in zip(names, states, strict=True):
            torch.testing.assert_close(fast[name](given), plain[name](given))
    assert len(calls) == 1 + 2 + 2 + 1
    assert fast["q_proj"].joint._states is None  # nothing is held until the next token


@int8
def test_int8_serves_unless_it_raises_the_loss_of_a_text_by_more_than_one_per_cent() -> None:
    plain = tiny_model().bfloat16()
    text = random_ids(1, CONTEXT)[0].tolist()
    good, bad = deepcopy(plain), deepcopy(plain)
    assert prepare(good, "int8", text)
    assert text_loss(good, text) == pytest.approx(text_loss(plain, text), rel=0.01)
    assert good.dtype == torch.bfloat16 and next(good.model.norm.parameters()).dtype == torch.float32
    with torch.no_grad():  # one weight of each row leaves no step for the others
        bad.model.layers[0].mlp.down_proj.weight[:, 0] = 1e4
        bad.model.layers[0].mlp.up_proj.weight[0] = 0
        bad.model.layers[0].mlp.up_proj.bias[0] = 0
    own = written(bad, random_ids(1, 1), do_sample=False)  # what the model knows how to write
    assert not prepare(bad, "int8", [*random_ids(1, 1)[0].tolist(), *own])


def test_other_networks_go_on_as_before() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    window = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    others = (
        GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=3, n_positions=CONTEXT)),
        MistralForCausalLM(MistralConfig(**sizes, **window, max_position_embeddings=CONTEXT)),
    )
    for plain in others:
        fast = deepcopy(plain.eval())
        prepare(fast, "float32")
        prompt = random_ids(1, 5)
        assert written(fast, prompt, do_sample=True) == written(plain, prompt, grows=False, do_sample=True)


@pytest.mark.parametrize(
    ("parameters", "seconds", "formats"),
    [
        (8_000_000, {}, ["float32"]),
        (124_000_000, {"float32": 8, "bfloat16": 5, "int8": 3}, ["bfloat16", "float32"]),
        (124_000_000, {"float32": 8, "bfloat16": 7.5, "int8": 3}, ["float32"]),
        (712_000_000, {"float32": 8, "bfloat16": 5, "int8": 3}, ["int8", "bfloat16", "float32"]),
        (712_000_000, {"float32": 8, "bfloat16": 20, "int8": 9}, ["float32"]),
        (712_000_000, {"float32": 8, "bfloat16": 5}, ["bfloat16", "float32"]),
    ],
)
def test_the_fastest_format_comes_first(parameters: int, seconds: dict[str, float], formats: list[str]) -> None:
    assert formats_by_speed(parameters, seconds) == formats


def test_each_format_is_timed_with_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counting(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*tensors: Any) -> Any:
            made.append(name)
            return make(*tensors)

        return noting

    layers = {name: (counting(name, make), dtype) for name, (make, dtype) in cpu_generation._LAYERS.items()}
    monkeypatch.setattr(cpu_generation, "_LAYERS", layers)
    times = time_formats(layers=2, seconds=0.01)
    assert list(times) == available_formats() and all(seconds > 0 for seconds in times.values())
    assert made == [name for name in available_formats() for _ in range(2)]


def test_the_space_has_the_same_file() -> None:
    own = Path(cpu_generation.__file__)
    assert own.read_bytes() == (Path(__file__).parents[2] / "space" / own.name).read_bytes()
