"""The key and value caches of one session: as long as its rows need, in blocks, up to the capacity.

Attention reads a cache from end to end, whatever its rows hold, so a step costs by the memory that is bound and not
by the tokens in it. In host memory a cache therefore starts with one block and grows, by copying, when a call needs
more. On a device, where a captured graph holds on to addresses and a copy goes through the host, it has its full size
from the start.

What a row computes must not depend on how much its neighbours hold. Where rows share calls of the engine they share
a cache, as long as the longest of them needs; entries beyond a row's position are masked, so they add exact zeros to
its sums, and its results are the same to the last bit (measured: validate/unit/runtime/test_session_growth.py).
Where each row runs alone, each has caches of its own, and nothing of the others can reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.engine.base import Buffer, Engine, Rows
from crt_export.runtime.sizes import TensorSizes
from crt_export.runtime.slide import Window

#: Tokens that a cache in host memory grows by.
BLOCK = 128


@dataclass(slots=True)
class _Lane:
    """Rows ``start`` to ``stop`` and their caches: name to buffer, [rows of the lane, heads, length, head_dim]."""

    start: int
    stop: int
    length: int
    buffers: dict[str, Buffer]


class Caches:
    """Every cache of a session, by the name of layer and kind such as ``0.key``."""

    def __init__(self, engine: Engine, sizes: TensorSizes, *, joins_rows: bool, on_move: Callable[[], object]) -> None:
        """Allocate the first block of every cache, zeroed; all of it on a device.

        Args:
            engine: Where it computes.
            sizes: Sizes of the session.
            joins_rows: Whether rows may share a call of the engine, hence a cache.
            on_move: Called before memory moves: what was bound to it may not run again.
        """
        self._engine = engine
        self._on_move = on_move
        self._sizes = sizes
        self._block = BLOCK if engine.host_memory and engine.fixed_capacity is None else sizes.capacity
        self._rows_of_lane = sizes.batch if joins_rows else 1
        names = [f"{layer}.{kind}" for layer in range(sizes.layers) for kind in ("key", "value")]
        rows, length = self._rows_of_lane, self._length(1)
        self._lanes = [
            _Lane(start, start + rows, length, {name: self._allocate(rows, length) for name in names})
            for start in range(0, sizes.batch, rows)
        ]

    def reserve(self, start: int, stop: int, tokens: int) -> None:
        """Make room for that many tokens in each of these rows."""
        for lane in self._lanes[start // self._rows_of_lane : (stop - 1) // self._rows_of_lane + 1]:
            if tokens > lane.length:
                self._resize(lane, self._length(tokens))

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows of a cache; all of one lane, as those of a call always are."""
        lane = self._lanes[start // self._rows_of_lane]
        return Rows(lane.buffers[name], start - lane.start, stop - lane.start)

    def read(self, length: int) -> dict[str, np.ndarray]:
        """Copies of the first ``length`` entries, [batch, heads, length, head_dim]; zeros where none are kept."""
        sizes = self._sizes
        shape = (sizes.batch, sizes.heads, length, sizes.head_dim)
        found = {name: np.zeros(shape, sizes.cache_dtype) for name in self._lanes[0].buffers}
        for lane in self._lanes:
            for name, buffer in lane.buffers.items():
                kept = min(length, buffer.shape[2])
                found[name][lane.start : lane.stop, :, :kept] = buffer.read()[:, :, :kept]
        return found

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """Replace everything by entries [batch, heads, length, head_dim]; zeros follow them."""
        for lane in self._lanes:
            self._resize(lane, self._length(next(iter(values.values())).shape[2]))
            for name, buffer in lane.buffers.items():
                given = values[name][lane.start : lane.stop]
                content = np.zeros(buffer.shape, buffer.dtype)
                content[:, :, : given.shape[2]] = given
                buffer.write(content)

    def slide(self, positions: Mapping[int, int], window: Window) -> None:
        """Move the latest tokens of some rows to the front.

        Args:
            positions: Row to the tokens in its cache.
            window: What to keep and how keys are turned.
        """
        for lane in self._lanes:
            full = {row: position for row, position in positions.items() if lane.start <= row < lane.stop}
            for name, buffer in lane.buffers.items() if full else ():
                values = np.array(buffer.read())
                for row, position in full.items():
                    index = row - lane.start
                    values[index] = window.slide(values[index], position, keys=name.endswith(".key"))
                buffer.write(values)

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the entries of tokens ``begin`` to ``end`` of one row."""
        lane = self._lanes[row // self._rows_of_lane]
        for buffer in lane.buffers.values():
            kept = min(end, buffer.shape[2])
            if begin < kept:
                buffer.clear(row - lane.start, begin, kept)

    def trim(self, positions: Sequence[int]) -> None:
        """Give back what no row needs, and zero every entry beyond the positions."""
        for lane in self._lanes:
            self._resize(lane, self._length(max(positions[lane.start : lane.stop])))
        for row, position in enumerate(positions):
            self.clear(row, position, self._sizes.capacity)

    def _length(self, tokens: int) -> int:
        """Length of a cache with room for that many: whole blocks, at least one, at most the capacity."""
        blocks = max(1, -(-tokens // self._block))
        return min(blocks * self._block, self._sizes.capacity)

    def _resize(self, lane: _Lane, length: int) -> None:
        """Give every cache of a lane this length, one by one; what an attempt out of memory left is resized again."""
        for name, buffer in lane.buffers.items():
            kept = min(buffer.shape[2], length)
            if buffer.shape[2] != length:
                self._on_move()
                lane.buffers[name] = self._allocate(buffer.shape[0], length)
                lane.buffers[name].read()[:, :, :kept] = buffer.read()[:, :, :kept]  # host memory: nothing else grows
        lane.length = length

    def _allocate(self, rows: int, length: int) -> Buffer:
        sizes = self._sizes
        return self._engine.allocate((rows, sizes.heads, length, sizes.head_dim), sizes.cache_dtype)
