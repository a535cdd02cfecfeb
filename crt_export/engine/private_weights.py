"""Weights that no longer depend on their file: what is still mapped from it after loading becomes a private copy.

ONNX Runtime packs most weights into memory of its own and lets go of the file; some, such as the embedding table, stay
mapped. Whoever overwrites or truncates the file then changes what a session computes, or ends the process. On Linux the
mappings are replaced by copies at the same addresses (mremap(2)); the copies are read from the file that was hashed.
``engines/cpp/src/engine/private_weights.cpp`` does the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crt_export.engine.huge_pages import without

#: Whether mappings can be found and replaced here.
REPLACES_MAPPINGS = sys.platform.startswith("linux")

_MAPS = Path("/proc/self/maps")
_MAYMOVE, _FIXED = 1, 2  # MREMAP_MAYMOVE, MREMAP_FIXED
_FAILED = ctypes.c_void_p(-1).value


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
        lines = [line.split() for line in _MAPS.read_bytes().decode(errors="replace").split("\n")[:-1]]
        own = _address_of(probe)
    found = [(*(int(part, 16) for part in line[0].split("-")), int(line[2], 16), line[3:5]) for line in lines]
    name = next((file for begin, end, _, file in found if begin <= own < end), None)
    if name is None or name[1] == "0":
        raise OSError("the file's mapping does not show in /proc/self/maps")
    return [
        FileMapping(begin=begin, end=end, offset=offset)
        for begin, end, offset, file in found
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
    try:
        _read(descriptor, copy, min(size, os.fstat(descriptor).st_size - offset), offset)
        if library.mremap(copy, size, size, _MAYMOVE | _FIXED, begin) == _FAILED:
            raise _last_error()
    except BaseException:
        library.munmap(ctypes.c_void_p(copy), ctypes.c_size_t(size))
        raise


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
