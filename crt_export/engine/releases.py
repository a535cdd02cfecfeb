"""Give back device memory, streams and graphs: each when its owner is gone, all that is left when an engine closes."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from crt_export.errors import ContractError


class Releases:
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
