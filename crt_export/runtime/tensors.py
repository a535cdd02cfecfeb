"""The tensors of one session: allocated once and bound to the engine's graphs.

What a call passes on to the next lives in two sets: token ids, positions and recurrent states. A call reads one
set and writes the other, as the contract pairs them (``input_ids`` with ``next_token``, ``position`` with
``next_position``, a state with its ``next_state``; none may alias), then the two swap roles. So the engine's own choice
and its positions are where the next step reads them, and a greedy loop uploads nothing. Caches are bound as input and
output at the same address, so they are updated in place; they grow with their rows
(:mod:`crt_export.runtime.caches`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crt_export.engine.base import Buffer, BufferSlice, Engine, Launch
from crt_export.models.declaration import STATE
from crt_export.runtime.caches import Caches, TensorSizes
from crt_export.runtime.prefill import PrefillCall, bind_by_name, own_tensors
from crt_export.runtime.rows import Batch
from crt_export.runtime.slide import Window
from crt_export.spec import graph_spec

# A batch of n rows has n(n+1)/2 slices; only the few that recur are worth keeping: at least each row, for both sets.
_MOST_KEPT_LAUNCHES = 64
_UNKNOWN = -1


class _Side:
    """One of the two sets, and what the host knows of its content."""

    def __init__(self, engine: Engine, sizes: TensorSizes) -> None:
        self.ids = engine.allocate((sizes.batch, 1), "int64")
        self.position = engine.allocate((sizes.batch,), "int64")
        self.states = {
            spec.tensor(STATE): engine.allocate((sizes.batch, 1, *spec.shape), spec.dtype)
            for spec in sizes.model.carried.states
        }
        #: By the name of the input.
        self.tensors = {"input_ids": self.ids, "position": self.position, **self.states}
        # Lists: comparing a few numbers takes numpy longer than the step of a small model can spare.
        self.known_ids = [_UNKNOWN] * sizes.batch
        self.known_position = [_UNKNOWN] * sizes.batch

    def forget(self) -> None:
        self.known_ids = [_UNKNOWN] * len(self.known_ids)
        self.known_position = [_UNKNOWN] * len(self.known_position)

    def set_ids(self, values: list[int], batches: Sequence[Batch]) -> None:
        """Upload one token id per row, unless the rows of the batches hold them already."""
        if any(values[b.start : b.stop] != self.known_ids[b.start : b.stop] for b in batches):
            self.ids.write(np.array(values, np.int64)[:, None])
            self.known_ids = list(values)

    def set_position(self, values: list[int], batches: Sequence[Batch]) -> None:
        """Upload one position per row, unless the rows of the batches hold them already."""
        if any(values[b.start : b.stop] != self.known_position[b.start : b.stop] for b in batches):
            self.position.write(np.array(values, np.int64))
            self.known_position = list(values)


class SessionTensors:
    """State, caches and per-call tensors of a session, and the launches bound to them."""

    def __init__(self, engine: Engine, sizes: TensorSizes, *, rows_are_independent: bool = True) -> None:
        """Allocate everything, zeroed; ``rows_are_independent``: whether rows may share a call of the engine."""
        self._engine = engine
        self._sizes = sizes
        self._logits = engine.allocate((sizes.batch, sizes.vocab), "float32")
        self._sides = (_Side(engine, sizes), _Side(engine, sizes))
        self._current = 0
        self._continued = dict(graph_spec("step", sizes.model, sizes.cache_dtype).continues)
        self._step_launches: dict[tuple[int, int, int], Launch] = {}
        self._caches = Caches(
            engine, sizes, rows_are_independent=rows_are_independent, on_move=self._step_launches.clear
        )
        self._single = self._tensors_of_one_token() if engine.one_graph else {}

    def step(self, ids: list[int], positions: list[int], batches: Sequence[Batch]) -> None:
        """Run one token per row of the batches.

        Args:
            ids: Token of every row of the batch.
            positions: Tokens in the cache of every row before this one.
            batches: Rows to run; all others stay as they are.
        """
        side = self._sides[self._current]
        side.set_ids(ids, batches)
        side.set_position(positions, batches)
        next_positions = [position + 1 for position in positions]
        self._reserve(batches, next_positions)
        for batch in batches:
            self._step_launch(batch)()
        self._swap(batches, next_positions)

    def prefill(
        self,
        rows: Sequence[np.ndarray],
        positions: list[int],
        batches: Sequence[Batch],
        passes: int | None = None,
        bound: float | None = None,
    ) -> list[tuple[Batch, np.ndarray | None]]:
        """Run several tokens per row of the batches.

        Args:
            rows: Tokens of every row of the batch, int64 [length].
            positions: Tokens in the cache of every row before these.
            batches: Rows to run; all others stay as they are.
            passes: None for as many as the bundle was built with, else the number of calls of ``prefill_pass``.
            bound: Residual at which passes end, for batches of one row; None: after all of them.

        Returns:
            Per batch its residual, float32 [rows of the batch]; None for a model that is not iterated.
        """
        if passes is None and self._engine.one_graph:
            passes = self._sizes.unroll
        self._sides[self._current].set_position(positions, batches)
        for batch in batches:
            self._reserve([batch], [position + batch.seq for position in positions])
        residuals = []
        for batch in batches:
            call = PrefillCall(
                tokens=rows[batch.start : batch.stop],
                positions=positions[batch.start : batch.stop],
                seq=batch.seq,
                model=self._sizes.model,
                passes=passes,
                bound=bound,
            )
            residuals.append((batch, call.run(self._engine, lambda name, batch=batch: self._shared(name, batch))))
        self._swap(batches, [position + row.size for position, row in zip(positions, rows, strict=True)])
        self._clear_padding(rows, positions, batches)
        return residuals

    def logits(self) -> np.ndarray:
        """float32 [batch, vocab], each row's from the last call that it took part in; may be the memory itself."""
        return self._logits.read()

    def next_tokens(self) -> list[int]:
        """The engine's argmax of the last call; other rows than those of that call are stale."""
        return self._sides[self._current].known_ids

    def states(self) -> dict[str, np.ndarray]:
        """Current recurrent states by the name of the graphs' input, [batch, 1, *shape]."""
        return {name: buffer.read() for name, buffer in self._sides[self._current].states.items()}

    def caches(self, length: int) -> dict[str, np.ndarray]:
        """Copies of the first ``length`` entries of every cache, [batch, heads, length, head_dim]."""
        return self._caches.read(length)

    def restore(self, caches: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray]) -> None:
        """Replace caches (shorter ones leave zeros behind) and states."""
        self._forget()
        self._caches.write(caches)
        for name, buffer in self._sides[self._current].states.items():
            buffer.write(states[name])

    def evict(self, positions: Mapping[int, int], windows: Sequence[Window]) -> None:
        """Forget what no window sees any longer of some rows, see :meth:`crt_export.runtime.caches.Caches.evict`."""
        self._caches.evict(positions, windows)

    def clear(self, positions: Sequence[int]) -> None:
        """Zero every cache entry beyond the positions, and the states of rows at position 0."""
        self._forget()
        self._caches.trim(positions)
        fresh = np.array(positions) == 0
        for side in self._sides:
            for buffer in side.states.values():
                values = np.array(buffer.read())
                values[fresh] = 0
                buffer.write(values)

    def _forget(self) -> None:
        """Trust nothing that an earlier call left in the two sets."""
        for side in self._sides:
            side.forget()

    def _clear_padding(self, rows: Sequence[np.ndarray], positions: list[int], batches: Sequence[Batch]) -> None:
        """Leave no trace of padding: beyond the position a value that is not finite spoils later logits."""
        for batch in batches:
            for row in range(batch.start, batch.stop):
                begin = positions[row]
                self._caches.clear(row, begin + rows[row].size, begin + batch.seq)

    def _reserve(self, batches: Sequence[Batch], lengths: Sequence[int]) -> None:
        """Make room for the longest row of every batch; ``lengths`` are those of all rows after the call."""
        for batch in batches:
            self._caches.reserve(batch.start, batch.stop, max(lengths[batch.start : batch.stop]))

    def _tensors_of_one_token(self) -> dict[str, Buffer]:
        """What a graph of any number of tokens takes and gives besides, when it makes a step."""
        sizes, allocate = self._sizes, self._engine.allocate
        length = allocate((sizes.batch,), "int64")
        length.write(np.ones(sizes.batch, np.int64))
        tensors = {"length": length}
        for name, (shape, dtype) in own_tensors(sizes.model, sizes.batch, 1).items():
            tensors[name] = allocate(shape, dtype)
        return tensors

    def _swap(self, batches: Sequence[Batch], next_positions: list[int]) -> None:
        """Make the written set the current one, after carrying over the states of the rows that did not run."""
        source, target = self._sides[self._current], self._sides[1 - self._current]
        begin = 0
        for batch in (*batches, Batch(self._sizes.batch, self._sizes.batch, 0)):
            for name, buffer in target.states.items() if begin < batch.start else ():
                buffer.copy_rows(source.states[name], slice(begin, batch.start))
            begin = batch.stop
        chosen = target.ids.read()[:, 0].tolist()
        for batch in batches:
            rows = slice(batch.start, batch.stop)
            target.known_ids[rows] = chosen[rows]
            target.known_position[rows] = next_positions[rows]
        self._current = 1 - self._current

    def _step_launch(self, batch: Batch) -> Launch:
        key = (batch.start, batch.stop, self._current)
        launch = self._step_launches.get(key)
        if launch is None:
            if len(self._step_launches) >= max(_MOST_KEPT_LAUNCHES, 4 * self._sizes.batch):
                self._step_launches.clear()
            program = self._engine.program("step")
            own = {name: BufferSlice(buffer, batch.start, batch.stop) for name, buffer in self._single.items()}
            launch = bind_by_name(program, own, lambda name: self._shared(name, batch), repeated=True)
            self._step_launches[key] = launch
        return launch

    def _shared(self, name: str, batch: Batch) -> BufferSlice:
        """The rows of the session's tensor that a graph calls ``name``."""
        family, _, rest = name.partition(".")
        if family in ("past_key_values", "present_key_values"):
            return self._caches.rows(rest, batch.start, batch.stop)
        if name == "logits":
            buffer = self._logits
        elif name in self._continued:
            buffer = self._sides[1 - self._current].tensors[self._continued[name]]
        else:
            buffer = self._sides[self._current].tensors[name]
        return BufferSlice(buffer, batch.start, batch.stop)
