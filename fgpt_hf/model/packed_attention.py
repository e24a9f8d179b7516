"""Attention within the documents of packed rows, by torch's variable-length kernel.

The kernel is told where documents begin and end, and does no work between them; a mask would keep attention off the
flash kernels, and take T² values for each row. Importing this module registers it with transformers as
`varlen_attention`.

Legend: B rows, T tokens of a row, H heads, D head size, K documents of a row, N all sequences of a batch.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from fgpt_hf.model.modeling_fgpt import VARLEN_ATTENTION

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
UNKNOWN_TO_KERNEL = ("sliding_window", "softcap", "s_aux", "position_bias")  # what other networks' attention may have


def packed_inputs(model: PreTrainedModel, ends: Tensor, tokens: int) -> dict[str, Any]:
    """Return what a model needs, besides positions, for its attention to stay within documents.

    No device is waited for. Attention that takes a plain mask gets nothing: transformers makes it from the positions.

    Args:
        ends: `(B, K)` int32, where the documents of each row end; the last end may be repeated.
        tokens: T, the length of the rows.
    """
    attention = model.config._attn_implementation
    if attention == VARLEN_ATTENTION or is_flash_attention_requested(model.config):
        return packed_bounds(ends, tokens)
    if attention == "flex_attention":
        return {"attention_mask": block_mask(ends, tokens)}
    return {}


def block_mask(ends: Tensor, tokens: int) -> BlockMask:
    """Return which tokens attend to which, as flex attention takes it: it leaves out blocks that no token attends to.

    Example:
        >>> block_mask(torch.tensor([[128, 256]], dtype=torch.int32), tokens=256).to_dense()[0, 0].tolist()
        [[1, 0], [0, 1]]
    """
    positions = torch.arange(tokens, device=ends.device, dtype=ends.dtype).repeat(len(ends), 1)
    document = torch.searchsorted(ends, positions, right=True)

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    return create_block_mask(same_document, len(ends), None, tokens, tokens, device=ends.device)


def packed_bounds(ends: Tensor, tokens: int) -> dict[str, Any]:
    """Return the arguments by which attention functions of transformers learn where documents lie in flattened rows.

    No document is longer than the row, which is known without waiting for the device.

    Args:
        ends: `(B, K)` int32, where the documents of each row end; the last end may be repeated.
        tokens: T, the length of the rows.

    Example:
        >>> packed_bounds(torch.tensor([[3, 5], [5, 5]], dtype=torch.int32), tokens=5)["cu_seq_lens_q"]
        tensor([ 0,  3,  5, 10, 10], dtype=torch.int32)
    """
    offsets = torch.arange(len(ends), device=ends.device, dtype=ends.dtype) * tokens
    bounds = nn.functional.pad((ends + offsets[:, None]).flatten(), (1, 0))
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": tokens, "max_length_k": tokens}


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend within documents where their bounds are given, and else as `sdpa` does, with the mask that is given.

    The kernel runs on CUDA, in bfloat16 or float16; elsewhere the bounds become a mask.

    Args:
        query: `(B, H, T, D)`; `key` and `value` may have fewer heads.
        cu_seq_lens_q: `(N + 1,)` int32, where the documents of all rows begin and end, from `packed_bounds`.
        max_length_q: a bound on the tokens of a document.

    Returns:
        The attended values, `(B, T, H, D)`, and None.

    Raises:
        ValueError: `dropout` of the weights is asked for, which the kernel lacks.
    """
    is_packed = cu_seq_lens_q is not None and query.shape[2] == key.shape[2]
    if not is_packed or any(kwargs.get(name) is not None for name in UNKNOWN_TO_KERNEL):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"{VARLEN_ATTENTION} has no dropout of the attention's weights: take sdpa, or attention_dropout=0"
        )
    assert cu_seq_lens_q is not None
    if not _kernel_takes(query):
        mask = same_document_mask(cu_seq_lens_q, query.shape[0], query.shape[2])
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    rows, _, tokens, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    longest = max_length_q if isinstance(max_length_q, int) else tokens  # in a traced graph it is a tensor
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    attended = attend_within(varlen_attn, query, key, value, cu_seq_lens_q, longest, scale)
    return attended.unflatten(0, (rows, tokens)), None


def same_document_mask(bounds: Tensor, rows: int, tokens: int) -> Tensor:
    """Return which tokens each token may attend to, `(B, 1, T, T)` bool: its own document's, up to itself.

    Example:
        >>> same_document_mask(torch.tensor([0, 1, 3]), rows=1, tokens=3)[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    positions = torch.arange(rows * tokens, device=bounds.device, dtype=bounds.dtype)
    document = torch.searchsorted(bounds[1:], positions, right=True).view(rows, 1, tokens)
    return (document[..., :, None] == document[..., None, :]).tril()


def attend_within(
    kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> Tensor:
    """Call `varlen_attn`, whose arguments differ between versions of torch, causally.

    2.10 has `is_causal`, and no scale; later ones have a window, of which `(-1, 0)` is the causal one, and last came
    grouped heads.

    Args:
        kernel: `torch.nn.attention.varlen.varlen_attn`, or a function with its arguments.
        query: `(N tokens, H, D)`; `key` and `value` may have fewer heads.
        bounds: `(N + 1,)` int32.
        longest: a bound on the tokens of a document.
    """
    parameters = _PARAMETERS if kernel is varlen_attn else frozenset(signature(kernel).parameters)
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "scale" in parameters:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in parameters:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    attended: Tensor = kernel(query, key, value, bounds, bounds, longest, longest, **options)
    return attended


_PARAMETERS = frozenset(signature(varlen_attn).parameters)


def _kernel_takes(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in KERNEL_DTYPES


AttentionInterface.register(VARLEN_ATTENTION, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN_ATTENTION, sdpa_mask)
