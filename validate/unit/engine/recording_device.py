"""A device without a GPU: numpy memory behind made-up addresses, work deferred until a stream is waited for.

It refuses what a GPU would punish with a wrong result, a crash or nothing at all: memory used after it was freed,
work on the default stream, a graph launched after its memory is gone, allocation while a stream is captured. Such a
misuse is an AssertionError and is kept, so that no handler can swallow it.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from crt_export.engine.tensorrt.device import CudaDevice
from crt_export.errors import ContractError

Operation = Callable[[], None]
#: No host address on any machine: a program that follows it by mistake ends at once.
_FIRST_ADDRESS = 0x7FFF_0000_0000_0000
_UNDEFINED = 0xFF  # NaN as float16 and float32, -1 as int64


@dataclass
class Graph:
    """What was captured."""

    thread: int = field(default_factory=threading.get_ident)
    operations: list[Operation] = field(default_factory=list)
    freed: list[Operation] = field(default_factory=list)


class RecordingDevice(CudaDevice):
    """A device that is none.

    Attributes:
        events: Every call: its name, and the device addresses it read or wrote.
        misuses: What a GPU would not have forgiven.
        fail: Call name to the number of further calls that succeed before one fails.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.misuses: list[str] = []
        self.fail: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._memory: dict[int, np.ndarray] = {}
        self._bases: list[int] = []
        self._next = _FIRST_ADDRESS
        self._pinned: dict[int, ctypes.Array[ctypes.c_uint8]] = {}
        self._streams: dict[int, list[Operation]] = {}
        self._capturing: dict[int, Graph] = {}
        self._graphs: dict[int, Graph] = {}
        self._names = itertools.count(1)
        self._lock = threading.RLock()

    # --- what a test asks -----------------------------------------------------------------------------------------
    @property
    def live(self) -> dict[str, int]:
        """Objects that were made and not given back."""
        return {
            "memory": len(self._memory),
            "pinned": len(self._pinned),
            "streams": len(self._streams),
            "graphs": len(self._graphs),
        }

    def misuse(self, text: str) -> AssertionError:
        """Keep a misuse and return it to be raised."""
        self.misuses.append(text)
        return AssertionError(text)

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address, uint8 [size]."""
        with self._lock:
            index = bisect.bisect_right(self._bases, address) - 1
            base = self._bases[index] if index >= 0 else 0
            memory = self._memory.get(base)
        if memory is None or address + size > base + memory.size:
            raise self.misuse(f"{size} bytes at {address:#x} are not allocated, or not any more")
        return memory[address - base : address - base + size]

    # --- memory ---------------------------------------------------------------------------------------------------
    def allocate(self, size: int) -> int:
        self._enter("allocate", 0)
        self._refuse_while_capturing("allocate")
        with self._lock:
            address = self._next
            self._next += (size + 511) // 256 * 256  # at least one byte between two allocations
            self._memory[address] = np.full(size, _UNDEFINED, np.uint8)
            self._bases.append(address)
        return address

    def free(self, address: int) -> None:
        self._enter("free", address)
        self._refuse_while_capturing("free")
        with self._lock:
            if self._memory.pop(address, None) is None:
                raise self.misuse(f"{address:#x} is freed, but not allocated")
            self._bases.remove(address)

    def allocate_host(self, size: int) -> int:
        self._enter("allocate_host", 0)
        self._refuse_while_capturing("allocate_host")
        memory = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(memory)
        self._pinned[address] = memory
        return address

    def free_host(self, address: int) -> None:
        self._enter("free_host", 0)
        self._refuse_while_capturing("free_host")
        del self._pinned[address]

    # --- streams --------------------------------------------------------------------------------------------------
    def create_stream(self) -> int:
        self._enter("create_stream", 0)
        stream = next(self._names)
        self._streams[stream] = []
        return stream

    def free_stream(self, stream: int) -> None:
        self._enter("free_stream", 0)
        if self._streams.pop(stream, None):
            raise self.misuse(f"stream {stream} is freed while work waits on it")

    def synchronize(self, stream: int) -> None:
        try:
            self._enter("synchronize", 0)
        except ContractError:
            self._stream(stream).clear()  # what failed is not done later
            raise
        if stream in self._capturing:
            raise ContractError("cudaStreamSynchronize failed with cudaErrorStreamCaptureUnsupported")
        waiting, self._streams[stream] = self._stream(stream), []
        for operation in waiting:
            operation()

    def enqueue(self, stream: int, operation: Operation, freed: Operation | None = None) -> bool:
        """Put work on a stream, or into the graph that is captured from it; True if captured."""
        graph = self._capturing.get(stream)
        if graph is None:
            self._stream(stream).append(operation)
            return False
        graph.operations.append(operation)
        if freed is not None:
            graph.freed.append(freed)
        return True

    def capturing(self, stream: int) -> bool:
        """Whether work on the stream is recorded instead of run."""
        return stream in self._capturing

    # --- copies ---------------------------------------------------------------------------------------------------
    def copy_to_device(self, target: int, source: np.ndarray, stream: int) -> None:
        self._enter("copy_to_device", target)
        self.enqueue(stream, lambda: np.copyto(self.view(target, source.nbytes), _bytes(source)))

    def copy_to_host(self, target: np.ndarray, source: int, stream: int) -> None:
        self._enter("copy_to_host", source)
        self.enqueue(stream, lambda: np.copyto(_bytes(target), self.view(source, target.nbytes)))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._enter("copy", target)
        self.enqueue(stream, lambda: np.copyto(self.view(target, size), self.view(source, size)))

    def fill_zero(self, address: int, *, pitch: int, width: int, height: int, stream: int) -> None:
        self._enter("fill_zero", address)

        def fill() -> None:
            for row in range(height):
                self.view(address + row * pitch, width)[:] = 0

        self.enqueue(stream, fill)

    # --- graphs ---------------------------------------------------------------------------------------------------
    def begin_capture(self, stream: int) -> None:
        self._enter("begin_capture", 0)
        if self._stream(stream):
            raise self.misuse("a capture begins while work waits on the stream")
        self._capturing[stream] = Graph()

    def end_capture(self, stream: int) -> int:
        try:
            self._enter("end_capture", 0)
        finally:
            graph = self._capturing.pop(stream)
        number = next(self._names)
        self._graphs[number] = graph
        return number

    def abandon_capture(self, stream: int) -> None:
        for freed in self._capturing.pop(stream).freed:
            freed()

    def launch_graph(self, graph: int, stream: int) -> None:
        self._enter("launch_graph", 0)
        if graph not in self._graphs:
            raise self.misuse(f"graph {graph} is launched, but freed")
        for operation in self._graphs[graph].operations:
            self.enqueue(stream, operation)

    def free_graph(self, graph: int) -> None:
        self._enter("free_graph", 0)
        for freed in self._graphs.pop(graph).freed:
            freed()

    def _enter(self, name: str, address: int) -> None:
        self.events.append((name, address))
        self.counts[name] += 1
        left = self.fail.get(name)
        if left is not None:
            self.fail[name] = left - 1
            if left == 0:
                raise ContractError(f"{name} failed with cudaErrorInjected")

    def _stream(self, stream: int) -> list[Operation]:
        if stream not in self._streams:
            raise self.misuse(f"work on stream {stream}, which does not exist (0 is the default stream)")
        return self._streams[stream]

    def _refuse_while_capturing(self, name: str) -> None:
        if any(graph.thread == threading.get_ident() for graph in list(self._capturing.values())):
            raise self.misuse(f"{name} in a thread that captures a stream")


def _bytes(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise AssertionError("only contiguous host memory can be copied")
    return array.reshape(-1).view(np.uint8)
