"""Which shapes of matrix products some code needs: oneDNN keeps compiled code for each in low precision."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ProductShapes(TorchDispatchMode):
    """The different shapes of the matrix products within."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.met.add((function, *(value.shape for value in args if isinstance(value, torch.Tensor))))
        return function(*args, **(kwargs or {}))
