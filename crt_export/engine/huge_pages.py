"""Weights in huge pages: a decode step reads all of them once, and with pages of 4 KiB waits for the page table too.

ONNX Runtime packs its weights into ordinary memory. On Linux ``madvise(MADV_COLLAPSE)`` moves what was allocated
meanwhile into huge pages, at the same addresses (madvise(2), since Linux 6.1); the C++ library does the same in
``engines/cpp/src/engine/huge_pages.cpp``. It is help, not a need: where the system has none to give, on an older Linux
or another system, everything stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Range = tuple[int, int]

_MAPS = Path("/proc/self/maps")
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE = 25  # MADV_COLLAPSE of asm-generic/mman-common.h
_LARGEST = 32 << 20  # ARM with pages of 64 KiB has 512 MiB
_PRIVATE = "p"
_NO_FILE = "0"


@contextmanager
def allocated_in_huge_pages(wanted: bool = True) -> Iterator[None]:
    """What the process allocates inside lies in huge pages afterwards, as far as the system has them to give.

    Memory that other threads allocate meanwhile does so too. Costs about 5 ms per 2 MiB, once.

    Args:
        wanted: False does nothing.
    """
    size = huge_page_size() if wanted else 0
    if not size:
        yield
        return
    before = private_memory()
    yield
    for begin, end in without(private_memory(), before):
        _collapse(-(-begin // size) * size, end // size * size)


def huge_page_size() -> int:
    """Bytes of a huge page; 0 where there are none, the administrator forbids them, or they would be mostly empty."""
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text(encoding="ascii"):
            return 0
        size = int((_SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return size if size <= _LARGEST else 0


def private_memory() -> list[Range]:
    """Addresses [begin, end) of the writable memory that belongs to this process alone and to no file, in order."""
    try:
        content = _MAPS.read_bytes()
    except OSError:
        return []
    found = []
    for line in content.decode(errors="replace").split("\n")[:-1]:
        addresses, access, _, _, inode, *_ = line.split()
        if access.startswith("rw") and access.endswith(_PRIVATE) and inode == _NO_FILE:
            begin, end = addresses.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def without(ranges: list[Range], taken: list[Range]) -> list[Range]:
    """What of the ranges [begin, end) lies in none of ``taken``; both are in order, and so is the result."""
    left = []
    for begin, end in ranges:
        for taken_begin, taken_end in taken:
            if taken_end <= begin or end <= taken_begin:
                continue
            if begin < taken_begin:
                left.append((begin, taken_begin))
            begin = taken_end
        if begin < end:
            left.append((begin, end))
    return left


def _collapse(begin: int, end: int) -> None:
    if begin < end:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(begin, end - begin, _COLLAPSE)  # an error: some of it stays as it was, which is no harm
