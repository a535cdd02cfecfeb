"""What the TensorRT session needs of a GPU: memory, copies, streams and captured graphs.

The genuine device is :mod:`crt_export.engine.cuda_device`; the tests run the same session over one that records
every call and computes on the host. Addresses, streams and graphs are plain numbers on both.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Device(Protocol):
    """One GPU. Every call raises ContractError, with the name of the CUDA error, if the GPU refuses or fails.

    Copies and fills are enqueued on a stream and may run later; ``synchronize`` waits for them. A call may come
    from any thread.
    """

    def allocate(self, size: int) -> int:
        """Address of ``size`` new bytes, a multiple of 256; their content is undefined."""
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def allocate_host(self, size: int) -> int:
        """Host address of ``size`` new bytes of pinned memory, which the GPU copies to and from at full speed."""
        ...

    def free_host(self, address: int) -> None:
        """Give pinned memory back."""
        ...

    def create_stream(self) -> int:
        """A stream of its own, which does not wait for the default stream."""
        ...

    def free_stream(self, stream: int) -> None:
        """Destroy a stream on which nothing runs any more."""
        ...

    def copy_to_device(self, target: int, source: np.ndarray, stream: int) -> None:
        """Copy all bytes of a contiguous host array, which must outlive the copy."""
        ...

    def copy_to_host(self, target: np.ndarray, source: int, stream: int) -> None:
        """Fill a contiguous host array, which must outlive the copy."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes within the device."""
        ...

    def fill_zero(self, address: int, *, pitch: int, width: int, height: int, stream: int) -> None:
        """Zero ``height`` runs of ``width`` bytes, ``pitch`` bytes from one to the next."""
        ...

    def begin_capture(self, stream: int) -> None:
        """From here on what is enqueued on the stream is recorded and not run."""
        ...

    def end_capture(self, stream: int) -> int:
        """A graph of what was recorded since ``begin_capture``, ready to launch."""
        ...

    def abandon_capture(self, stream: int) -> None:
        """End a capture that failed, so that the stream can be used again; never raises."""
        ...

    def launch_graph(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        ...

    def free_graph(self, graph: int) -> None:
        """Destroy a captured graph that does not run any more."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until everything enqueued on the stream has run."""
        ...
