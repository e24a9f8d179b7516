"""Attention within packed rows: equal to plain attention, forward and backward, by every way it is computed."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fgpt_hf.data.batch_fields import DOCUMENT_ENDS
from fgpt_hf.data.batches import as_batch
from fgpt_hf.losses.objectives import Batch, LanguageModelObjective
from fgpt_hf.model import packed_attention
from fgpt_hf.model.modeling_fgpt import VARLEN_ATTENTION
from fgpt_hf.model.packed_attention import attend_within
from fgpt_hf.runtime.plan import split_batch
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID
from tests.support.tiny_network import EVERY_NETWORK, packed, padded, random_ids, tiny_model

LENGTH, HEADS = 40, 2


def packed_rows() -> Batch:
    """Return rows of documents of many lengths, one of them a single token, with padding behind the last."""
    ids = np.random.default_rng(0).integers(3, 90, (3, LENGTH)).astype(np.uint16)
    for row, starts in enumerate([(0, 7, 8, 30), (0,), (0, 20)]):
        ids[row, list(starts)] = END_OF_TEXT_ID
    ids[0, -5:] = PAD_ID
    return as_batch(ids)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Attend in each document alone, in the kernel's layout."""
    assert is_causal and int(bounds.diff().max()) <= longest and bounds.dtype == torch.int32
    attended = []
    for span in (slice(*span) for span in pairwise(bounds.tolist())):
        parts = (part[span].transpose(0, 1)[None] for part in (query, key, value))
        attended.append(nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=scale)[0])
    return torch.cat(attended, dim=1).transpose(0, 1)


def kernel_of_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    return reference(query, key, value, cu_seq_q, max_q, is_causal, None)


def kernel_of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return reference(query, key, value, cu_seq_q, max_q, window_size == (-1, 0), scale)


def kernel_of_2_13(
    *arguments: Any, scale: float, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False
) -> Tensor:
    query, key, value, bounds, _, longest, _ = arguments
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return reference(query, key, value, bounds, longest, window_size == (-1, 0), scale)


KERNELS = {"2.10": kernel_of_2_10, "2.11": kernel_of_2_11, "2.13": kernel_of_2_13}


def losses_and_gradients(model: Any, attention: str, batch: Batch) -> list[Tensor]:
    """Return the losses, then the gradient of each parameter."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    loss = LanguageModelObjective(model)(batch)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def wide_model(head_size: int, **changes: Any) -> Any:
    shape = {"hidden_size": HEADS * head_size, "num_attention_heads": HEADS, "vocab_size": 50304}
    model = tiny_model(**shape | {"num_hidden_layers": 1, "max_position_embeddings": LENGTH} | changes).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@pytest.mark.parametrize("head_size", [54, 64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_of_every_torch_equals_eager_attention(
    kernel: str, head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference with the arguments of the kernel takes its place, which runs on GPUs only."""
    calls = []

    def counted(function: Callable[..., Tensor], *rest: Any) -> Tensor:
        calls.append(rest[-3].shape)
        return attend_within(KERNELS[kernel], *rest)

    model, batch = wide_model(head_size), packed_rows()
    expected = losses_and_gradients(model, "eager", batch)
    monkeypatch.setattr(packed_attention, "_kernel_takes", lambda query: True)
    monkeypatch.setattr(packed_attention, "attend_within", counted)
    monkeypatch.setattr("fgpt_hf.model.blocks_fgpt.PADDED_DEVICES", ("cpu",))
    assert_alike(losses_and_gradients(model, VARLEN_ATTENTION, batch), expected)
    assert calls == [(1 + batch[DOCUMENT_ENDS].numel(),)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_share_keys_in_groups(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wide_model(16, num_key_value_heads=1), packed_rows()
    expected = losses_and_gradients(model, "eager", batch)
    monkeypatch.setattr(packed_attention, "_kernel_takes", lambda query: True)
    monkeypatch.setattr(packed_attention, "attend_within", lambda _, *rest: attend_within(KERNELS[kernel], *rest))
    assert_alike(losses_and_gradients(model, VARLEN_ATTENTION, batch), expected)


@pytest.mark.parametrize("name", EVERY_NETWORK)
def test_where_the_kernel_does_not_run_the_bounds_become_a_mask(name: str) -> None:
    model = tiny_model(**EVERY_NETWORK[name])
    ids, positions = random_ids(2, 20), packed(8, 12)
    expected = model(ids, position_ids=positions).logits
    model.set_attn_implementation(VARLEN_ATTENTION)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)


def test_without_packing_masks_and_caches_work_as_with_sdpa() -> None:
    model = tiny_model()
    ids, mask, positions = padded("left")
    given = {"attention_mask": mask, "position_ids": positions}
    expected = model(ids, **given).logits[mask == 1]
    written = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    model.set_attn_implementation(VARLEN_ATTENTION)
    torch.testing.assert_close(model(ids, **given).logits[mask == 1], expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), written)


@pytest.mark.parametrize("head_size", [54, 64])
@pytest.mark.parametrize("attention", [VARLEN_ATTENTION, "flex_attention"])
def test_a_compiled_network_is_one_graph_for_batches_of_other_documents(attention: str, head_size: int) -> None:
    """Without gradients: on a CPU, torch has no backward pass of flex attention."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model, batch = wide_model(head_size), packed_rows()
    objective = LanguageModelObjective(model)
    batches = [batch, {name: tensor.flip(0) for name, tensor in batch.items()}]
    with torch.no_grad():
        expected = [objective(each) for each in batches]
        model.set_attn_implementation(attention)
        model.get_decoder().compile(fullgraph=True, backend=backend)
        torch.testing.assert_close([objective(each) for each in batches], expected)
    assert len(graphs) == 1


def test_dropout_of_the_weights_is_refused() -> None:
    model = tiny_model(attention_dropout=0.1).train()
    model.set_attn_implementation(VARLEN_ATTENTION)
    with pytest.raises(ValueError, match="has no dropout of the attention's weights"):
        model(random_ids(2, 20), position_ids=packed(8, 12))


def test_the_parts_of_a_batch_keep_the_ends_of_their_documents() -> None:
    batch = packed_rows()
    ends = batch[DOCUMENT_ENDS].tolist()
    assert ends == [[7, 8, 30, 35, 40, 40, 40, 40], [40] * 8, [20, *[40] * 7]]
    assert [part[DOCUMENT_ENDS].tolist() for part in split_batch(batch, 1)] == [[row] for row in ends]
