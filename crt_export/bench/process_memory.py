"""Memory that this process holds, and the share of a file that the system holds; None where it does not say."""

from __future__ import annotations

import ctypes
import importlib
import math
import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps_rollup")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes of this process.

    Attributes:
        pss: Proportional set size: shared pages divided by the number of processes that share them.
        anonymous: Pages that belong to no file: what a process allocated and wrote.
    """

    pss: int | None
    anonymous: int | None


def usage() -> Usage:
    """What the process holds now; Linux only."""
    sizes = _kilobytes(_SMAPS)
    return Usage(pss=sizes.get("Pss"), anonymous=sizes.get("Anonymous"))


def peak_rss() -> int | None:
    """The largest resident set so far, in bytes."""
    peak = _kilobytes(_STATUS).get("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def cached_share(path: Path) -> float | None:
    """Share of a file's pages that are in the page cache, 0 to 1: 1 means that reading it never waits for the disk."""
    size = path.stat().st_size
    if not sys.platform.startswith("linux") or size == 0:
        return None
    pages = math.ceil(size / mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        found = library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
    finally:
        library.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return None if found != 0 else sum(page & 1 for page in resident) / pages


def device_bytes_in_use() -> int | None:
    """Bytes in use on the first GPU, by anybody; None without NVIDIA's CUDA runtime for Python or a GPU."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    status, free, total = runtime.cudaMemGetInfo()
    return None if int(status) != 0 else total - free


def _kilobytes(path: Path) -> dict[str, int]:
    """``Name:  123 kB`` lines as bytes by name; empty where there is no such file."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
