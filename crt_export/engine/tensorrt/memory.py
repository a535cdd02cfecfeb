"""Device memory of a session, with pinned host memory for what crosses over.

Memory, streams and graphs are given back each when its owner is gone, all that is left when an engine closes.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from crt_export.engine.base import Buffer
from crt_export.engine.tensorrt.device import CudaDevice
from crt_export.errors import ContractError


class DeviceResources:
    """What one engine must give back. Python decides when an owner goes, so each release may come in any thread."""

    def __init__(self) -> None:
        self.closed = False
        self._numbers = itertools.count()
        self._left: dict[int, weakref.finalize] = {}
        self._captures = 0
        self._late: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()

    def attach(
        self, owner: object, release: Callable[..., None], *arguments: Any, outlives_engine: bool = False
    ) -> None:
        """Call ``release(*arguments)`` once: when ``owner`` is gone, or on :meth:`close` unless it outlives that."""
        number = next(self._numbers)
        finalizer = weakref.finalize(owner, self._release, number, release, arguments)
        if not outlives_engine:
            self._left[number] = finalizer

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Release nothing inside: freeing memory in a thread that captures a stream spoils the capture."""
        with self._lock:
            self._captures += 1
        try:
            yield
        finally:
            with self._lock:
                self._captures -= 1
            self._release_late()

    def close(self) -> None:
        """Release everything that is left, the newest first; closing twice is harmless."""
        self.closed = True
        for number in sorted(self._left, reverse=True):
            finalizer = self._left.get(number)
            if finalizer is not None:
                finalizer()
        self._release_late()

    def require_open(self) -> None:
        """Refuse to go on after :meth:`close`.

        Raises:
            ContractError: Closed.
        """
        if self.closed:
            raise ContractError("this engine is closed: its memory and its graphs are gone; open the bundle again")

    def _release(self, number: int, release: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._left.pop(number, None)
        if self._captures:
            self._late.append((release, arguments))
        else:
            _run(release, arguments)

    def _release_late(self) -> None:
        while self._late and not self._captures:
            _run(*self._late.popleft())


def _run(release: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # A GPU that refuses to free has failed before, and the call it failed in has said so.
    with suppress(ContractError):
        release(*arguments)


#: Larger tensors (caches, which cross over only for snapshots) go through ordinary memory: pinned memory is scarce.
MOST_PINNED = 16 << 20


class DeviceMemory:
    """Allocates an engine's tensors and runs the copies between them and the host, on a stream of its own."""

    def __init__(self, device: CudaDevice, resources: DeviceResources) -> None:
        self.device = device
        self.resources = resources
        self.stream = device.create_stream()
        resources.attach(self, device.free_stream, self.stream)

    def allocate(self, size: int, owner: object) -> int:
        """Address of ``size`` bytes (content undefined) that are freed with their owner.

        Raises:
            ContractError: The device has no more, or the engine is closed.
        """
        self.resources.require_open()
        address = self.device.allocate(max(size, 1))
        self.resources.attach(owner, self.device.free, address)
        return address

    def pinned(self, size: int) -> np.ndarray:
        """Pinned host memory, uint8 [size], that lives as long as the array or any view of it."""
        address = self.device.allocate_host(max(size, 1))
        block = _PinnedBlock(address, size)
        self.resources.attach(block, self.device.free_host, address, outlives_engine=True)
        return np.asarray(block)


class DeviceTensor:
    """One tensor in device memory; see :class:`crt_export.engine.base.Buffer`."""

    def __init__(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: str) -> None:
        """Allocate zeros."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._memory = memory
        self._size = math.prod(shape) * self.dtype.itemsize
        self._host: np.ndarray | None = None
        self.address = memory.allocate(self._size, self)
        self._zero(self.address, pitch=self._size, width=self._size, height=1)

    def read(self) -> np.ndarray:
        """The content in host memory that the next read or write of this tensor overwrites."""
        host = self._host_memory()
        memory = self._open_memory()
        memory.device.copy_to_host(host, self.address, memory.stream)
        memory.device.synchronize(memory.stream)
        return self._as_tensor(host)

    def write(self, values: np.ndarray) -> None:
        """Replace the whole content."""
        host = self._host_memory()
        memory = self._open_memory()
        self._as_tensor(host)[...] = values
        memory.device.copy_to_device(self.address, host, memory.stream)
        memory.device.synchronize(memory.stream)

    def copy_rows(self, source: Buffer, rows: slice) -> None:
        """Take these rows from another tensor of this device, without the host."""
        begin, end, _ = rows.indices(self.shape[0])
        memory, row = self._open_memory(), self._size // self.shape[0]
        memory.device.copy(self.address + begin * row, source.address + begin * row, (end - begin) * row, memory.stream)
        memory.device.synchronize(memory.stream)

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the cache entries of some tokens of one row: a run of bytes per head."""
        _, heads, length, *rest = self.shape
        entry = math.prod(rest) * self.dtype.itemsize
        start = self.address + (row * heads * length + begin) * entry
        self._zero(start, pitch=length * entry, width=(end - begin) * entry, height=heads)

    def _zero(self, address: int, *, pitch: int, width: int, height: int) -> None:
        memory = self._open_memory()
        memory.device.fill_zero(address, pitch=pitch, width=width, height=height, stream=memory.stream)
        memory.device.synchronize(memory.stream)

    def _open_memory(self) -> DeviceMemory:
        self._memory.resources.require_open()
        return self._memory

    def _host_memory(self) -> np.ndarray:
        if self._host is not None:
            return self._host
        if self._size > MOST_PINNED:
            return np.empty(self._size, np.uint8)
        self._host = self._memory.pinned(self._size)
        return self._host

    def _as_tensor(self, host: np.ndarray) -> np.ndarray[Any, Any]:
        return host.view(self.dtype).reshape(self.shape)


class _PinnedBlock:
    """Owner of pinned memory: numpy keeps it alive as long as any view of the memory."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
