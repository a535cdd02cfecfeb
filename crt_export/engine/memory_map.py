"""The memory map of this process: weights in huge pages, and weights that no longer depend on their file.

A decode step reads all weights once, and with pages of 4 KiB waits for the page table too. ONNX Runtime packs most of
them into ordinary memory. On Linux ``madvise(MADV_COLLAPSE)`` moves what was allocated meanwhile into huge pages, at
the same addresses (madvise(2), since Linux 6.1). It is help, not a need: where the system has none to give, on an
older Linux or another system, everything stays as it is.

Some weights, such as the embedding table, stay mapped from their file. Whoever overwrites or truncates it then changes
what a session computes, or ends the process. On Linux the mappings are replaced by copies at the same addresses
(mremap(2)); the copies are read from the file that was hashed.

The C++ library does the same in ``engines/cpp/src/engine/memory_map.cpp``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

Range = tuple[int, int]

_MAPS = Path("/proc/self/maps")
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE = 25  # MADV_COLLAPSE of asm-generic/mman-common.h
_LARGEST = 32 << 20  # ARM with pages of 64 KiB has 512 MiB
_PRIVATE = "p"
_NO_FILE = "0"
#: Whether mappings can be found and replaced here.
REPLACES_MAPPINGS = sys.platform.startswith("linux")
_MAYMOVE, _FIXED = 1, 2  # MREMAP_MAYMOVE, MREMAP_FIXED
_FAILED = ctypes.c_void_p(-1).value


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
        lines = _map_lines()
    except OSError:
        return []
    return [
        (begin, end)
        for begin, end, access, _, _, inode in lines
        if access.startswith("rw") and access.endswith(_PRIVATE) and inode == _NO_FILE
    ]


def _map_lines() -> list[tuple[int, int, str, int, str, str]]:
    """Begin, end, access, offset, device and inode of every mapping, in order of addresses; OSError without /proc."""
    found = []
    for line in _MAPS.read_bytes().decode(errors="replace").split("\n")[:-1]:
        addresses, access, offset, device, inode, *_ = line.split()
        begin, end = (int(part, 16) for part in addresses.split("-"))
        found.append((begin, end, access, int(offset, 16), device, inode))
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


@dataclass(frozen=True, kw_only=True)
class FileMapping:
    """Memory that is mapped from a file.

    Attributes:
        begin: First address.
        end: Address after the last.
        offset: Where in the file it begins.
    """

    begin: int
    end: int
    offset: int


def mappings_of(descriptor: int) -> list[FileMapping]:
    """Where the file is mapped in this process, in order of addresses.

    File systems in layers show another device in /proc than in fstat(2), so the file is mapped once more, to see what
    it is called there.

    Raises:
        OSError: /proc cannot be read, or the file not be mapped.
    """
    if os.fstat(descriptor).st_size == 0:
        return []
    with mmap.mmap(descriptor, 1, access=mmap.ACCESS_READ) as probe:
        found, own = _map_lines(), _address_of(probe)
    name = next((file for begin, end, _, _, *file in found if begin <= own < end), None)
    if name is None or name[1] == _NO_FILE:
        raise OSError("the file's mapping does not show in /proc/self/maps")
    return [
        FileMapping(begin=begin, end=end, offset=offset)
        for begin, end, _, offset, *file in found
        if file == name and not begin <= own < end
    ]


def make_private(descriptor: int, before: Iterable[FileMapping]) -> None:
    """Replace every mapping of the file by a copy, but for those of ``before``; nobody may unmap them meanwhile.

    Raises:
        OSError: The file became shorter, or memory is short; some of it may still be mapped then.
    """
    taken = [(mapping.begin, mapping.end) for mapping in before]
    for mapping in mappings_of(descriptor):
        for begin, end in without([(mapping.begin, mapping.end)], taken):
            _replace(descriptor, begin, end, mapping.offset + begin - mapping.begin)


def _address_of(mapped: mmap.mmap) -> int:
    """Address of a read-only mapping, which ctypes does not take."""
    import numpy as np

    return int(np.frombuffer(mapped, np.uint8).ctypes.data)


def _replace(descriptor: int, begin: int, end: int, offset: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = library.mremap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    library.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    size = end - begin
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    copy = library.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if copy == _FAILED:
        raise _last_error()
    with ExitStack() as unmoved:
        unmoved.callback(library.munmap, ctypes.c_void_p(copy), ctypes.c_size_t(size))
        _read(descriptor, copy, min(size, os.fstat(descriptor).st_size - offset), offset)
        if library.mremap(copy, size, size, _MAYMOVE | _FIXED, begin) == _FAILED:
            raise _last_error()
        unmoved.pop_all()


def _read(descriptor: int, address: int, size: int, offset: int) -> None:
    if size <= 0:
        return
    target = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    done = 0
    while done < size:
        count = os.preadv(descriptor, [target[done : done + (64 << 20)]], offset + done)
        if count == 0:
            raise OSError("the weight file became shorter while it was loaded")
        done += count


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
