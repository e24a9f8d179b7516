"""Attention implementations, recorded outputs, compiled and exported graphs."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fgpt_hf.model import blocks_fgpt
from fgpt_hf.model.blocks_fgpt import eager_attention_forward
from tests.support.tiny_network import CONTEXT, packed, padded, random_ids, tiny_model

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
            head_sizes.append((query.shape[2], query.shape[3])) or plain(module, query, *rest, **kwargs)  # type: ignore[func-returns-value]
        ),
    )
    monkeypatch.setattr(blocks_fgpt, "PADDED_DEVICES", ("cpu",))
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
    def varlen(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any, **kwargs: Any) -> Any:
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


@pytest.mark.slow
def test_it_compiles_as_one_graph() -> None:
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, positions = random_ids(2, 20), packed(8, 12)
    with torch.no_grad():
        for given in ({}, {"position_ids": positions}):
            torch.testing.assert_close(compiled(ids, **given).logits, model(ids, **given).logits)
        assert compiled.get_input_embeddings().weight is compiled.lm_head.weight  # type: ignore[attr-defined]
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
    masks: list[Any] = []

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
