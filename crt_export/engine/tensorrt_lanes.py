"""Execution contexts, each with a stream of its own, lent to one launch at a time.

A context may serve one thread at a time and one captured graph, and it holds scratch memory. So a graph keeps its
lane as long as it lives, and a plain launch borrows one for the length of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from crt_export.engine.device import Device
from crt_export.engine.releases import Releases
from crt_export.engine.tensorrt_api import IExecutionContext
from crt_export.errors import ContractError


@dataclass
class Lane:
    """A context and the stream that its runs are enqueued on."""

    context: IExecutionContext
    stream: int


class Lanes:
    """The lanes of one engine that are captured, or of those that are not."""

    def __init__(
        self, create: Callable[[], IExecutionContext | None], device: Device, releases: Releases, *, label: str
    ) -> None:
        self._create = create
        self._device = device
        self._releases = releases
        self._label = label
        self._free: list[Lane] = []
        self._lock = threading.Lock()

    def borrow(self) -> Lane:
        """A lane that nobody else uses until it is given back.

        Raises:
            ContractError: TensorRT makes no further context.
        """
        self._releases.require_open()
        with self._lock:
            if self._free:
                return self._free.pop()
            context = self._create()
        if context is None:
            raise ContractError(
                f"{self._label}: no execution context, most often for lack of GPU memory: close other sessions, or "
                "build with a smaller --capacity"
            )
        lane = Lane(context, self._device.create_stream())
        self._releases.attach(lane, self._device.free_stream, lane.stream)
        return lane

    def give_back(self, lane: Lane) -> None:
        """Let others use the lane; nothing of it runs any more. May be called while Python collects garbage."""
        self._free.append(lane)

    def close(self) -> None:
        """Destroy the contexts that nobody holds: they must go before their engine."""
        self._free.clear()
