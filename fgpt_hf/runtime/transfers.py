"""Move values between the host and the device without making either wait for the other."""

from collections.abc import Mapping

import torch
from torch import Tensor


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device; on CUDA from pinned memory, where the copy is queued and the host continues.

    Example:
        >>> to_device({"labels": torch.ones(2)}, torch.device("cpu"))
        {'labels': tensor([1., 1.])}
    """
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


QUEUED_COPIES = ("cuda", "xpu")  # the devices whose copies to the host can be waited for later


class HostCopy:
    """A copy of a few values that a device is still computing, to be read later.

    Example:
        >>> HostCopy(torch.tensor([1.5, 2.0])).read()
        [1.5, 2.0]
    """

    def __init__(self, values: Tensor) -> None:
        is_queued = values.device.type in QUEUED_COPIES
        self._values = values.detach().to("cpu", non_blocking=is_queued)
        self._copied = torch.Event(values.device.type) if is_queued else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[float]:
        """Return the values, once the device has come to them."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values
