"""The tensors of one session: allocated once and bound to the engine's graphs.

Every call reads the state from one buffer and writes it to the other (``next_state`` never aliases
``state``), then the two swap roles. Caches are bound as input and output at the same address, so they are
updated in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.engine.base import Buffer, Engine, Launch, Program, Rows
from crt_export.runtime.rows import Group, padded

# A batch of n rows has n(n+1)/2 slices; only the few that recur are worth keeping.
_MOST_KEPT_LAUNCHES = 64


@dataclass(frozen=True, kw_only=True)
class TensorSizes:
    """Sizes of a session; ``cache_head_dim`` may be padded, ``recurrent`` says whether there is a state."""

    batch: int
    capacity: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    cache_head_dim: int
    cache_dtype: str
    recurrent: bool


class SessionTensors:
    """State, caches and per-call tensors of a session, and the launches bound to them."""

    def __init__(self, engine: Engine, sizes: TensorSizes) -> None:
        """Allocate everything, zeroed."""
        self._engine = engine
        self._sizes = sizes
        batch = sizes.batch
        self._ids = engine.allocate((batch, 1), "int64")
        self._position = engine.allocate((batch,), "int64")
        self._logits = engine.allocate((batch, sizes.vocab), "float32")
        self._next_token = engine.allocate((batch, 1), "int64")
        self._next_position = engine.allocate((batch,), "int64")
        state_shape = (batch, 1, sizes.hidden)
        states = 2 if sizes.recurrent else 0
        self._states = [engine.allocate(state_shape, "float32") for _ in range(states)]
        self._current = 0
        cache_shape = (batch, sizes.heads, sizes.capacity, sizes.cache_head_dim)
        self._caches: dict[str, Buffer] = {
            f"{layer}.{kind}": engine.allocate(cache_shape, sizes.cache_dtype)
            for layer in range(sizes.layers)
            for kind in ("key", "value")
        }
        self._step_launches: dict[tuple[int, int, int], Launch] = {}

    def step(self, ids: np.ndarray, positions: np.ndarray, groups: Sequence[Group]) -> None:
        """Run one token per row of the groups.

        Args:
            ids: int64 [batch, 1].
            positions: Tokens in the cache before this one, int64 [batch].
            groups: Rows to run; all others stay as they are.
        """
        self._ids.write(ids)
        self._position.write(positions)
        for group in groups:
            self._step_launch(group)()
        self._swap_states(groups)

    def prefill(
        self, rows: Sequence[np.ndarray], positions: np.ndarray, groups: Sequence[Group]
    ) -> list[tuple[Group, np.ndarray | None]]:
        """Run several tokens per row of the groups.

        Args:
            rows: Tokens of every row of the batch, int64 [length].
            positions: Tokens in the cache before these, int64 [batch].
            groups: Rows to run; all others stay as they are.

        Returns:
            Per group its residual, float32 [rows of the group]; None for a plain transformer.
        """
        self._position.write(positions)
        residuals = []
        for group in groups:
            residuals.append((group, self._prefill_group(rows[group.start : group.stop], group)))
        self._swap_states(groups)
        self._clear_padding(rows, positions, groups)
        return residuals

    def logits(self) -> np.ndarray:
        """float32 [batch, vocab] of the last call; may be the memory itself."""
        return self._logits.read()

    def state(self) -> np.ndarray | None:
        """Current recurrent state, float32 [batch, 1, hidden]; None for a plain transformer."""
        return self._states[self._current].read() if self._states else None

    def clear(self, positions: np.ndarray) -> None:
        """Zero every cache entry beyond the positions, and the state of rows at position 0."""
        for row, position in enumerate(positions.tolist()):
            self._clear_caches(row, position, self._sizes.capacity)
        fresh = positions == 0
        for state in self._states:
            values = state.read()
            state.write(np.where(fresh[:, None, None], np.float32(0), values))

    def _clear_padding(self, rows: Sequence[np.ndarray], positions: np.ndarray, groups: Sequence[Group]) -> None:
        """Leave no trace of padding: beyond the position a value that is not finite spoils later logits."""
        for group in groups:
            for row in range(group.start, group.stop):
                begin = int(positions[row])
                self._clear_caches(row, begin + rows[row].size, begin + group.seq)

    def _clear_caches(self, row: int, begin: int, end: int) -> None:
        if begin < end:
            for cache in self._caches.values():
                cache.clear(row, begin, end)

    def _swap_states(self, groups: Sequence[Group]) -> None:
        """Make the written buffer the current one, after carrying over the rows that did not run."""
        if not self._states:
            return
        source, target = self._states[self._current], self._states[1 - self._current]
        begin = 0
        for group in (*groups, Group(self._sizes.batch, self._sizes.batch, 0)):
            if begin < group.start:
                target.copy_rows(source, slice(begin, group.start))
            begin = group.stop
        self._current = 1 - self._current

    def _step_launch(self, group: Group) -> Launch:
        key = (group.start, group.stop, self._current)
        launch = self._step_launches.get(key)
        if launch is None:
            if len(self._step_launches) >= _MOST_KEPT_LAUNCHES:
                self._step_launches.clear()
            launch = self._bind(self._engine.program("step"), group, {"input_ids": self._rows(self._ids, group)})
            self._step_launches[key] = launch
        return launch

    def _prefill_group(self, rows: Sequence[np.ndarray], group: Group) -> np.ndarray | None:
        program = self._engine.program("prefill")
        count = group.stop - group.start
        own = {
            "input_ids": self._filled(padded(rows, group.seq)),
            "length": self._filled([row.size for row in rows]),
        }
        iterate = (count, group.seq, self._sizes.hidden)
        own["next_hidden"] = _whole(self._engine.allocate(iterate, "float32"))
        if self._sizes.recurrent:
            own["hidden"] = _whole(self._engine.allocate(iterate, "float32"))
            own["residual"] = _whole(self._engine.allocate((count,), "float32"))
        self._bind(program, group, own)()
        return own["residual"].buffer.read() if "residual" in own else None

    def _filled(self, values: np.ndarray | list[int]) -> Rows:
        array = np.asarray(values, np.int64)
        buffer = self._engine.allocate(array.shape, "int64")
        buffer.write(array)
        return _whole(buffer)

    def _bind(self, program: Program, group: Group, own: dict[str, Rows]) -> Launch:
        """Bind every input and output of the program by name, from ``own`` or from the session's tensors."""
        inputs = {spec.name: own.get(spec.name) or self._shared(spec.name, group) for spec in program.inputs}
        outputs = {spec.name: own.get(spec.name) or self._shared(spec.name, group) for spec in program.outputs}
        return program.bind(inputs, outputs)

    def _shared(self, name: str, group: Group) -> Rows:
        family, _, rest = name.partition(".")
        if family in ("past_key_values", "present_key_values"):
            return self._rows(self._caches[rest], group)
        if name == "state":
            return self._rows(self._states[self._current], group)
        if name == "next_state":
            return self._rows(self._states[1 - self._current], group)
        tensors = {
            "position": self._position,
            "logits": self._logits,
            "next_token": self._next_token,
            "next_position": self._next_position,
        }
        return self._rows(tensors[name], group)

    @staticmethod
    def _rows(buffer: Buffer, group: Group) -> Rows:
        return Rows(buffer, group.start, group.stop)


def _whole(buffer: Buffer) -> Rows:
    return Rows(buffer, 0, buffer.shape[0])
