"""Muon, with matrices of one shape orthogonalized together, and by shares where several processes train one model.

Muon (Jordan et al. 2024) moves a matrix along its momentum with all singular values brought near one, by a few products
of matrices. All processes of a run would make the same products; here each makes those of its share of the matrices,
and they exchange the results.

Legend: n matrices of a shape, R rows, C columns, P processes.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fgpt_hf.runtime.hardware import supports_bf16

# Values that one batch of products takes: on a GPU many, within a small part of its memory; on a CPU, a matrix fills
# the cores by itself, and more of them only leave the cache.
MOST_VALUES = {"cuda": 1 << 27, "cpu": 1}


class Muon(torch.optim.Muon):
    """torch's Muon, for matrices that are whole or that FSDP2 shards by rows.

    Products are bfloat16, as torch's, or float32 where the hardware only emulates bfloat16, which would take up to a
    hundred times as long. Updates equal torch's but for the rounding of batched products; on a CPU they are equal bit
    for bit.

    Attributes:
        found_inf: a tensor without dimensions that is 1 where this step is to change nothing, as torch's fused
            optimizers take it from a loss scaler; None if that is not asked for.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = Muon([weight], lr=0.02, adjust_lr_fn="match_rms_adamw")
        >>> weight.sum().backward()
        >>> optimizer.step()
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every matrix that has a gradient; without a wait for the device, and with the other processes."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            moved = sorted((weight for weight in group["params"] if weight.grad is not None), key=_shape)
            for shape, weights in groupby(moved, key=_shape):
                self._move(list(weights), shape, group)
        return loss

    def _move(self, weights: Sequence[nn.Parameter], shape: tuple[int, int], group: dict[str, Any]) -> None:
        momentum, skip = group["momentum"], self.found_inf
        decay_factor, keep = 1 - group["lr"] * group["weight_decay"], 1 - momentum
        if skip is not None:
            decay_factor, keep = torch.where(skip > 0, 1.0, decay_factor), keep * (1 - skip)
        updates = []
        for weight in weights:
            gradient = _local(weight.grad)
            if skip is not None:
                gradient.nan_to_num_(0.0, 0.0, 0.0)  # so a momentum that keeps nothing of it stays as it is
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = _local(state["momentum_buffer"]).lerp_(gradient, keep)
            updates.append(gradient.lerp(buffer, momentum) if group["nesterov"] else buffer)
        moves = self._orthogonalized(updates, weights[0], group)
        rate = _adjusted_rate(group["lr"], group["adjust_lr_fn"], shape)
        for moved, move in zip(map(_local, weights), moves, strict=True):
            moved.mul_(decay_factor)
            moved.add_(move, alpha=-rate)

    def _orthogonalized(self, updates: Sequence[Tensor], like: Tensor, group: dict[str, Any]) -> Sequence[Tensor]:
        """Return n updates with their singular values near one, as this process holds them: whole, or its rows of each.

        Args:
            updates: this process's values of each matrix, whole or some rows.
            like: one of the weights, which tells by its type whether they are sharded.
            group: the settings of torch's Muon.
        """
        dtype = torch.bfloat16 if supports_bf16(updates[0].device) else torch.float32
        processes, shape, skip = _processes_of(like), _shape(like), self.found_inf
        if processes is None:
            return _newton_schulz_in_parts(updates, dtype, group, skip)
        low = [update.to(dtype) for update in updates]
        if isinstance(like, DTensor):
            whole = _collect_rows(low, shape, processes)
            return _return_rows(_newton_schulz_in_parts(whole, dtype, group, skip), low, shape, processes)
        own = [low[index] for index in _share(len(low), processes, processes.rank())]
        return _gather(_newton_schulz_in_parts(own, dtype, group, skip), low, processes)


def _newton_schulz_in_parts(
    matrices: Sequence[Tensor], dtype: torch.dtype, group: dict[str, Any], skip: Tensor | None
) -> list[Tensor]:
    """Orthogonalize matrices of one shape, in batches of `MOST_VALUES`."""
    if not matrices:
        return []
    size = max(1, MOST_VALUES.get(matrices[0].device.type, 1 << 27) // matrices[0].numel())
    parts = (torch.stack([each.to(dtype) for each in matrices[at : at + size]]) for at in range(0, len(matrices), size))
    return [matrix for part in parts for matrix in newton_schulz(part, group, skip)]


def newton_schulz(matrices: Tensor, group: dict[str, Any], skip: Tensor | None = None) -> Tensor:
    """Return matrices, `(n, R, C)`, with their singular values near one: torch's iteration, for several at once.

    Example:
        >>> settings = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
        >>> newton_schulz(torch.eye(2)[None] * 5, settings)[0].diagonal().round(decimals=1)
        tensor([1.1000, 1.1000])
    """
    a, b, c = group["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.mT if is_tall else matrices
    size = result.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    result = result / (size if skip is None else size.masked_fill(skip > 0, torch.inf))
    for _ in range(group["ns_steps"]):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.mT if is_tall else result


def _share(matrices: int, processes: dist.ProcessGroup, rank: int) -> range:
    """Return the indices of the matrices that a process orthogonalizes."""
    each = -(-matrices // processes.size())
    return range(min(rank * each, matrices), min((rank + 1) * each, matrices))


def _gather(own: Sequence[Tensor], like: Sequence[Tensor], processes: dist.ProcessGroup) -> list[Tensor]:
    """Return the matrices of all processes, whose shares `own` is one of."""
    each = len(_share(len(like), processes, 0))
    padded = [*own, *[torch.zeros_like(like[0])] * (each - len(own))]
    gathered = like[0].new_empty(each * processes.size(), *like[0].shape)
    parts = [_as_bytes(part) for part in gathered.chunk(processes.size())]
    dist.all_gather(parts, _as_bytes(torch.stack(padded)), group=processes)
    return list(gathered[: len(like)])


def _collect_rows(parts: Sequence[Tensor], shape: tuple[int, int], processes: dist.ProcessGroup) -> list[Tensor]:
    """Return whole the matrices of this process's share, of all of which each process has some rows."""
    everyone, mine = range(processes.size()), _share(len(parts), processes, processes.rank())
    sent = torch.cat([part.flatten() for part in parts])  # shares are in order of rank
    sizes = [len(mine) * _rows(shape, processes, rank) * shape[1] for rank in everyone]
    received = _exchange(
        sent, [len(_share(len(parts), processes, rank)) * parts[0].numel() for rank in everyone], sizes, processes
    )
    blocks = [block.view(len(mine), -1, shape[1]) for block in received.split(sizes) if len(block)]
    return list(torch.cat(blocks, dim=1)) if mine else []


def _return_rows(
    own: Sequence[Tensor], parts: Sequence[Tensor], shape: tuple[int, int], processes: dist.ProcessGroup
) -> list[Tensor]:
    """Return this process's rows of all matrices, of which each process has its share whole: `_collect_rows` undone."""
    everyone = range(processes.size())
    rows = [_rows(shape, processes, rank) for rank in everyone]
    blocks = [torch.stack(list(own)).split(rows, dim=1)] if own else []
    sent = torch.cat([part.flatten() for block in blocks for part in block]) if own else parts[0].new_empty(0)
    sizes = [len(_share(len(parts), processes, rank)) * parts[0].numel() for rank in everyone]
    received = _exchange(sent, [len(own) * count * shape[1] for count in rows], sizes, processes)
    return list(received.view(len(parts), *parts[0].shape))


def _exchange(sent: Tensor, sent_sizes: list[int], sizes: list[int], processes: dist.ProcessGroup) -> Tensor:
    """Send to each process its part of some values, and return what all sent to this one, in order of rank."""
    received = sent.new_empty(sum(sizes))
    width = sent.element_size()
    dist.all_to_all_single(
        *(_as_bytes(received), _as_bytes(sent)),
        [size * width for size in sizes],
        [size * width for size in sent_sizes],
        group=processes,
    )
    return received


def _rows(shape: tuple[int, int], processes: dist.ProcessGroup, rank: int) -> int:
    """Return how many rows of a matrix a process holds: as FSDP2 and `torch.chunk` divide them."""
    most = -(-shape[0] // processes.size())
    return max(0, min(most, shape[0] - rank * most))


def _as_bytes(values: Tensor) -> Tensor:
    """Return the bytes of contiguous values, which every backend can send."""
    return values.view(-1).view(torch.uint8)


def _processes_of(weight: Tensor) -> dist.ProcessGroup | None:
    """Return the processes that hold a weight: its shards, or copies of it; None for one process."""
    if isinstance(weight, DTensor):
        return weight.device_mesh.get_group()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _local(tensor: Tensor | None) -> Tensor:
    """Return this process's part of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _adjusted_rate(rate: float, adjustment: str | None, shape: tuple[int, int]) -> float:
    """Return the learning rate of a matrix, by the adjustments of torch's Muon."""
    rows, columns = shape
    if adjustment == "match_rms_adamw":
        return rate * (0.2 * math.sqrt(max(rows, columns)))
    return rate * math.sqrt(max(1, rows / columns))
