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

from crt_export.engine.base import Buffer, BufferSlice, Engine
from crt_export.models.declaration import CacheSpec, ModelInfo
from crt_export.runtime.slide import Window

#: Tokens that a cache in host memory grows by.
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class TensorSizes:
    """What a session's tensors are made of.

    Attributes:
        batch: Rows.
        capacity: Most tokens of a row.
        model: Vocabulary, hidden size, states and caches.
        cache_dtype: ``float32`` or ``float16``.
        unroll: Passes that prefill makes where nobody asks for a number; None for a model that is not iterated.
    """

    batch: int
    capacity: int
    model: ModelInfo
    cache_dtype: str
    unroll: int | None = None

    @property
    def vocab(self) -> int:
        """Logits of a row."""
        return self.model.vocab_size

    @property
    def caches(self) -> dict[str, CacheSpec]:
        """What each cache is, by number and kind such as ``0.key``."""
        specs = enumerate(self.model.carried.caches)
        return {f"{index}.{kind}": spec for index, spec in specs for kind in ("key", "value")}


@dataclass(slots=True)
class _CacheGroup:
    """Rows ``start`` to ``stop`` and their caches: name to buffer, [rows of the group, heads, length, head_dim]."""

    start: int
    stop: int
    length: int
    buffers: dict[str, Buffer]


class Caches:
    """Every cache of a session, by number and kind such as ``0.key``."""

    def __init__(
        self, engine: Engine, sizes: TensorSizes, *, rows_are_independent: bool, on_move: Callable[[], object]
    ) -> None:
        """Allocate the first block of every cache, zeroed; all of it on a device.

        Args:
            engine: Where it computes.
            sizes: Sizes of the session.
            rows_are_independent: Whether rows may share a call of the engine, hence a cache.
            on_move: Called before memory moves: what was bound to it may not run again.
        """
        self._engine = engine
        self._on_move = on_move
        self._sizes = sizes
        self._block = BLOCK if engine.host_memory and engine.fixed_capacity is None else sizes.capacity
        self._rows_of_group = sizes.batch if rows_are_independent else 1
        self._specs = sizes.caches
        rows, length = self._rows_of_group, self._length(1)
        self._groups = [
            _CacheGroup(start, start + rows, length, {name: self._allocate(name, rows, length) for name in self._specs})
            for start in range(0, sizes.batch, rows)
        ]

    def reserve(self, start: int, stop: int, tokens: int) -> None:
        """Make room for that many tokens in each of these rows."""
        for group in self._groups[start // self._rows_of_group : (stop - 1) // self._rows_of_group + 1]:
            if tokens > group.length:
                self._resize(group, self._length(tokens))

    def rows(self, name: str, start: int, stop: int) -> BufferSlice:
        """Rows of a cache; all of one group, as those of a call always are."""
        group = self._groups[start // self._rows_of_group]
        return BufferSlice(group.buffers[name], start - group.start, stop - group.start)

    def read(self, length: int) -> dict[str, np.ndarray]:
        """Copies of the first ``length`` entries, [batch, heads, length, head_dim]; zeros where none are kept."""
        found = {
            name: np.zeros((self._sizes.batch, spec.heads, length, spec.head_dim), self._sizes.cache_dtype)
            for name, spec in self._specs.items()
        }
        for group in self._groups:
            for name, buffer in group.buffers.items():
                kept = min(length, buffer.shape[2])
                found[name][group.start : group.stop, :, :kept] = buffer.read()[:, :, :kept]
        return found

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """Replace everything by entries [batch, heads, length, head_dim]; zeros follow them."""
        for group in self._groups:
            self._resize(group, self._length(next(iter(values.values())).shape[2]))
            for name, buffer in group.buffers.items():
                given = values[name][group.start : group.stop]
                content = np.zeros(buffer.shape, buffer.dtype)
                content[:, :, : given.shape[2]] = given
                buffer.write(content)

    def evict(self, positions: Mapping[int, int], windows: Sequence[Window]) -> None:
        """Forget what no window sees any longer of some rows: their latest tokens move to the front.

        Args:
            positions: Row to the tokens in its cache.
            windows: Per cache what to keep, the same number of tokens, and how keys are turned.
        """
        for group in self._groups:
            full = {row: position for row, position in positions.items() if group.start <= row < group.stop}
            for name, buffer in group.buffers.items() if full else ():
                window = windows[int(name.partition(".")[0])]
                values = np.array(buffer.read())
                for row, position in full.items():
                    index = row - group.start
                    values[index] = window.evict(values[index], position, keys=name.endswith(".key"))
                buffer.write(values)

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the entries of tokens ``begin`` to ``end`` of one row."""
        group = self._groups[row // self._rows_of_group]
        for buffer in group.buffers.values():
            kept = min(end, buffer.shape[2])
            if begin < kept:
                buffer.clear(row - group.start, begin, kept)

    def trim(self, positions: Sequence[int]) -> None:
        """Give back what no row needs, and zero every entry beyond the positions."""
        for group in self._groups:
            self._resize(group, self._length(max(positions[group.start : group.stop])))
        for row, position in enumerate(positions):
            self.clear(row, position, self._sizes.capacity)

    def _length(self, tokens: int) -> int:
        """Length of a cache with room for that many: whole blocks, at least one, at most the capacity."""
        blocks = max(1, -(-tokens // self._block))
        return min(blocks * self._block, self._sizes.capacity)

    def _resize(self, group: _CacheGroup, length: int) -> None:
        """Give every cache of a group this length, one by one; what an attempt out of memory left is resized again."""
        for name, buffer in group.buffers.items():
            kept = min(buffer.shape[2], length)
            if buffer.shape[2] != length:
                self._on_move()
                group.buffers[name] = self._allocate(name, buffer.shape[0], length)
                group.buffers[name].read()[:, :, :kept] = buffer.read()[:, :, :kept]  # host memory: nothing else grows
        group.length = length

    def _allocate(self, name: str, rows: int, length: int) -> Buffer:
        spec = self._specs[name]
        return self._engine.allocate((rows, spec.heads, length, spec.head_dim), self._sizes.cache_dtype)
