"""Describe the devices of a run: known GPUs by their data sheets, this machine by asking it."""

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from fgpt_hf.errors import UserError

PRODUCTS, PRODUCT_SECONDS = 20, 0.3  # to measure a rate: at most this many, for about this long


class GPU(NamedTuple):
    """A GPU's dense bfloat16 rate with float32 sums, its memory, and a pattern of the name that its driver reports."""

    bf16_teraflops: float
    gigabytes: float
    pattern: str


# From NVIDIA's data sheets; halved where a sheet counts sparsity.
GPUS: Mapping[str, GPU] = {
    "a100-40gb": GPU(312, 40, r"\bA100.*40GB"),
    "a100-80gb": GPU(312, 80, r"\bA100.*80GB"),
    "h100": GPU(989, 80, r"\bH100 80GB HBM3"),  # SXM
    "h100-pcie": GPU(756, 80, r"\bH100 PCIe"),
    "h200": GPU(989, 141, r"\bH200$"),  # SXM
    "gh200": GPU(989, 96, r"\bGH200 480GB"),
    "a10": GPU(125, 24, r"\bA10$"),
    "l4": GPU(121, 24, r"\bL4$"),
    "l40s": GPU(362, 48, r"\bL40S$"),
    "rtx-3090": GPU(71, 24, r"\bRTX 3090$"),
    "rtx-4090": GPU(165, 24, r"\bRTX 4090$"),
    "rtx-pro-6000": GPU(504, 96, r"\bRTX PRO 6000 Blackwell"),  # 503.8 without sparsity, by hmc-tech.com
}


class Machine(NamedTuple):
    """The devices of a run, all of one kind.

    Attributes:
        name: how messages call one of them.
        kind: torch's device type, such as `cuda`.
        memory_bytes: memory that one process can use.
        has_bf16: whether they multiply bfloat16 in hardware.
        peak_flops: bfloat16 operations per second of one device, or None if unknown.
        processes: number of devices, one for each process.
        own_bytes: memory that this process itself takes before it trains, with Python and its libraries; 0 where that
            is not the memory of the device.
    """

    name: str
    kind: str
    memory_bytes: int
    has_bf16: bool
    peak_flops: float | None
    processes: int
    own_bytes: int = 0


def known_machine(name: str, processes: int = 1) -> Machine:
    """Return a machine of `processes` GPUs from the table.

    Raises:
        UserError: the table has no GPU of this name.

    Example:
        >>> known_machine("l4").memory_bytes
        24000000000
    """
    if name not in GPUS:
        raise UserError(f"device={name!r} is not known: the devices are {', '.join(GPUS)}")
    gpu = GPUS[name]
    return Machine(name, "cuda", int(gpu.gigabytes * 1e9), True, gpu.bf16_teraflops * 1e12, processes)


def this_machine(device: torch.device, processes: int = 1) -> Machine:
    """Return the machine that this process runs on, with the memory that is free now."""
    bf16 = supports_bf16(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu = find_gpu(name)
        peak_flops = gpu.bf16_teraflops * 1e12 if gpu else None
        return Machine(name, device.type, torch.cuda.mem_get_info(device)[0], bf16, peak_flops, processes)
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # they share this machine's memory
    own = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    free = _free_memory_bytes() // processes_here
    return Machine(f"this {device.type}", device.type, free, bf16, None, processes, own)


def find_gpu(driver_name: str) -> GPU | None:
    """Return the GPU of the table that the driver reports under this name, or None."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, driver_name)), None)


def device_name(device: torch.device) -> str:
    """Return the manufacturer's name of a device, and for a CPU the number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def supports_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware, not by way of float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the GPU, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))  # Windows records a peak, macOS only the present


def product_flops(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> float:
    """Measure the operations per second of products like those of a network, `(rows, width) @ (width, 4 width)`.

    It takes a fraction of a second. The fastest of some products counts, since other programs can only slow them down.
    """
    left = torch.ones(rows, width, device=device, dtype=dtype)
    right = torch.ones(width, 4 * width, device=device, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < PRODUCTS and sum(seconds) < PRODUCT_SECONDS:
        began = time.perf_counter()
        (left @ right)[-1, -1].item()  # which waits for the device
        seconds.append(time.perf_counter() - began)
    return 8 * rows * width * width / min(seconds)


def keep_freed_memory() -> None:
    """Let glibc keep large buffers for the next step, instead of returning them and faulting them in again."""
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, -1)
    mallopt(m_top_pad, 64 << 20)


def _free_memory_bytes() -> int:
    """Return the memory that is free or reclaimable from caches, or what a container's limit leaves if that is less."""
    free = psutil.virtual_memory().available
    return min(free, container_memory_bytes(Path("/sys/fs/cgroup")) or free)


def container_memory_bytes(cgroup: Path) -> int | None:
    """Return the memory that a container may still take, by its control group; None if it has no limit."""
    limit, used, stat = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text == "max":
        return None
    numbers = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    taken = int(used.read_text()) - int(numbers.get("inactive_file", 0)) if used.is_file() else 0
    return max(1, int(text) - taken)
