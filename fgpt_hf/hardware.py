"""What the machine can do: number formats, memory, and how it is best used."""

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch


def supports_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, rather than through float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: the accelerator's, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)  # Windows records a peak, macOS the present only


def keep_freed_memory() -> None:
    """Let the C library keep large buffers for the next step, instead of giving them back to be faulted in again."""
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, -1)
    mallopt(m_top_pad, 64 << 20)


def device_name(device: torch.device) -> str:
    """What the maker calls the device that a process computes on, with the number of cores for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
