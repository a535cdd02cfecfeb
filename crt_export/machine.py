"""This machine: its processor, to read a measured figure with, and the GPUs that NVIDIA's driver offers."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

# CUdevice_attribute values of the CUDA driver API (cuda.h, unchanged since CUDA 5).
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


def machine() -> dict[str, str | int]:
    """``system``, ``architecture``, ``processor``, usable ``cores`` and ``python`` of this machine."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's own name; Linux tells it in /proc only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU: its name and its SM version times ten (80 is SM 8.0)."""

    name: str
    compute_capability: int


def list_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that the installed driver offers; none where there is no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, ordinal) for ordinal in range(count.value))


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name=name.value.decode(errors="replace"), compute_capability=major.value * 10 + minor.value)
