"""Tap: what the engine reads and writes in every launch of a decoder, seen without touching either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.engine.base import Buffer, BufferSlice, Engine, Launch, Program


@dataclass(frozen=True, slots=True)
class _Ran:
    """A launch and the memory it was bound to."""

    graph: str
    inputs: Mapping[str, BufferSlice]
    outputs: Mapping[str, BufferSlice]

    def read(self, name: str) -> np.ndarray:
        """An input or output, the memory itself."""
        return _view(self.inputs[name] if name in self.inputs else self.outputs[name])


class Tap:
    """Sees every launch of a decoding."""

    def __init__(self) -> None:
        #: Told after every pass which rows made it and their residual, float32 [rows].
        self.on_pass: Callable[[slice, np.ndarray], None] | None = None
        self.broken: list[str] = []
        self.hidden = np.empty((0, 0, 0), np.float32)
        self._latest: dict[int, _Ran] = {}
        self._start: list[int] = []

    def begin(self, positions: Sequence[int], tokens: int, hidden: int) -> None:
        """A call begins: tokens in the caches before it, and those that a prefill brings per row."""
        self.broken.clear()
        self._latest.clear()
        self._start = list(positions)
        if tokens:
            self.hidden = np.full((len(positions), tokens, hidden), np.nan, np.float32)

    def saw(self, ran: _Ran) -> None:
        """A launch has ended."""
        first = ran.outputs["logits"].start
        self._latest[first] = ran
        place = f"row {first}" if len(self._start) > 1 else "the row"
        self.broken += [f"{ran.graph}: {text}" for text in _contradictions(ran, self._start[first:], place)]
        if "next_hidden" in ran.outputs and ran.graph != "step":
            self._keep_hidden(ran)
        if self.on_pass is not None and "residual" in ran.outputs:
            rows = ran.outputs["logits"]
            self.on_pass(slice(rows.start, rows.stop), ran.read("residual"))

    def output(self, name: str) -> np.ndarray | None:
        """The rows of an output, of all launches that were the last of theirs."""
        ran = [self._latest[first] for first in sorted(self._latest)]
        if not ran or name not in ran[0].outputs:
            return None
        parts = [launch.read(name) for launch in ran]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _keep_hidden(self, ran: _Ran) -> None:
        """Passes leave out what is exact already, so a token's h is that of the last pass over it."""
        rows, values = ran.outputs["logits"], ran.read("next_hidden")
        for index, position in enumerate(ran.read("position").tolist()):
            row = rows.start + index
            # At the first call of a chunk the engine may read a position of its own; the decoder's count is the truth.
            begin = max(0, position - self._start[row])
            kept = self.hidden[row, begin : begin + values.shape[1]]
            kept[...] = values[index, : len(kept)]


def _contradictions(ran: _Ran, positions: Sequence[int], place: str) -> Iterator[str]:
    """What the outputs of a launch say against each other and against its inputs."""
    logits, chosen = ran.read("logits"), ran.read("next_token")[:, 0]
    length = ran.read("length") if "length" in ran.inputs else np.ones(len(logits), np.int64)
    before = np.asarray(positions[: len(logits)]) if ran.graph == "step" else ran.read("position")
    found = ran.read("next_position")
    wrong = found != before + length
    if wrong.any():
        row = int(wrong.argmax())
        expected = int(before[row] + length[row])
        yield f"next_position is {found[row]} after token {expected - 1} of {place}, expected {expected}"
    finite = np.isfinite(logits).all(axis=1)
    if (finite & (chosen != logits.argmax(axis=1))).any():
        yield f"next_token after token {int(before[0] + length[0]) - 1} of {place} is not the argmax of logits"
    if "next_state" in ran.outputs and "next_hidden" in ran.outputs:
        hidden, last = ran.read("next_hidden"), np.maximum(length - 1, 0)
        state = ran.read("next_state")[:, 0]
        if not np.array_equal(state, hidden[np.arange(len(hidden)), last], equal_nan=True):
            yield "next_state is not next_hidden of the last token"


class WatchedEngine:
    """A runner's engine under another's eyes; see :class:`crt_export.engine.base.Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_tokens = engine.max_tokens
        self.max_batch = engine.max_batch
        self.fixed_capacity = engine.fixed_capacity
        self.host_memory = engine.host_memory
        self.one_graph = engine.one_graph

    def program(self, graph: str) -> Program:
        """The loaded graph of this name."""
        return self._engine.program(graph)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New zeroed memory where this engine computes."""
        return self._engine.allocate(shape, dtype)

    def close(self) -> None:
        """The engine is the runner's."""


class TappedEngine(WatchedEngine):
    """An engine whose launches are seen by a tap."""

    def __init__(self, engine: Engine, tap: Tap) -> None:
        super().__init__(engine)
        self._tap = tap

    def program(self, graph: str) -> Program:
        return _TappedProgram(graph, super().program(graph), self._tap)


class _TappedProgram:
    """A program whose launches are seen by a tap; see :class:`crt_export.engine.base.Program`."""

    def __init__(self, graph: str, program: Program, tap: Tap) -> None:
        self._graph, self._program, self._tap = graph, program, tap
        self.inputs, self.outputs = program.inputs, program.outputs

    def bind(
        self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
    ) -> Launch:
        launch = self._program.bind(inputs, outputs, repeated=repeated)
        ran = _Ran(self._graph, dict(inputs), dict(outputs))
        addresses = {rows.address for rows in inputs.values()}
        # What is updated in place holds what earlier calls wrote; all else must be written by this one.
        owned = [_view(rows) for rows in outputs.values() if rows.address not in addresses]
        unwritten = [(values, np.nan if values.dtype.kind == "f" else -1) for values in owned]

        def run() -> None:
            for values, poison in unwritten:
                values.fill(poison)
            launch()
            self._tap.saw(ran)

        return run


def _view(rows: BufferSlice) -> np.ndarray:
    """The rows of a buffer in host memory, the memory itself."""
    return rows.buffer.read()[rows.start : rows.stop]
