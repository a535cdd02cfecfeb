"""Prompts: what a target does of its own accord, what a call asks for, and one chunk of it through the prefill graphs.

Token by token is the exact recurrence. K parallel passes over a chunk are an iteration towards it, exact with as many
passes as the chunk has tokens. The adaptive method goes on with passes until the residual, the largest change of h in a
pass, is at most a bound that the build tied to a gap in perplexity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crt_export.checked import shown, whole_number
from crt_export.engine.base import Buffer, BufferSlice, Engine, Launch, Program
from crt_export.errors import InputError, UnsupportedError
from crt_export.models.declaration import ITERATE, NEXT_ITERATE, STATE, ModelInfo
from crt_export.runtime.rows import padded

STEPS = "steps"
PASSES = "passes"
ADAPTIVE = "adaptive"
#: What a caller asks for to have the recurrence.
EXACT = "exact"
WORDS = (ADAPTIVE, EXACT)
_LARGEST_BOUND = float(np.finfo(np.float32).max)
#: Gives the session's rows that a graph's tensor of this name is bound to.
SharedRows = Callable[[str], BufferSlice]
_PASS = "prefill_pass"


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """What a target does where the caller leaves it the choice.

    Attributes:
        method: ``steps``, ``passes`` or ``adaptive``.
        passes: K of ``passes``, most passes of a chunk with ``adaptive``; None: those that the bundle was built with,
            one for a model that is not iterated.
        chunk: Most tokens of a chunk; None: the target's limit.
        shortest: A chunk of fewer tokens goes token by token, which is exact, and as fast for so few.
        residual_bound: Residual at which ``adaptive`` stops; None where none is known.
        perplexity_gap: What stopping there cost at most in perplexity, upper end of a 95 % interval; None: not known.
    """

    method: str = PASSES
    passes: int | None = None
    chunk: int | None = None
    shortest: int = 1
    residual_bound: float | None = None
    perplexity_gap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry of a target in the manifest."""
        return {
            "method": self.method,
            "passes": self.passes or 1,
            "chunk": self.chunk,
            "shortest": self.shortest,
            "residual_bound": self.residual_bound,
            "perplexity_gap": self.perplexity_gap,
        }


@dataclass(frozen=True, kw_only=True)
class PrefillRule:
    """How one call runs.

    Attributes:
        passes: Most passes of a chunk; None: those that the bundle was built with.
        bound: Residual at which a chunk is done; None: after all passes.
        shortest: Chunks of fewer tokens go token by token.
        chunk: Most tokens of a chunk.
    """

    passes: int | None
    bound: float | None
    shortest: int
    chunk: int


def plan_from_entry(entry: Mapping[str, Any], *, iterated: bool) -> PrefillPlan:
    """The plan of a target's entry in the manifest.

    Args:
        entry: The target's entry, checked.
        iterated: Whether the model has passes at all.
    """
    if not iterated:
        return PrefillPlan()
    return PrefillPlan(**{key: entry["prefill"][key] for key in PrefillPlan().to_dict()})


def prefill_rule(
    plan: PrefillPlan,
    passes: int | str | None,
    chunk: int | None,
    *,
    most: int,
    iterated: bool,
    unroll: int | None,
    target: str,
) -> PrefillRule:
    """What a call comes to.

    Args:
        plan: The target's own choice.
        passes: A number of passes, ``adaptive``, ``exact``, or None for the plan.
        chunk: Most tokens of a chunk, or None.
        most: Most tokens that a call of the engine takes.
        iterated: Whether the model has passes at all.
        unroll: Passes that the target was built with, which every target can make.
        target: Its name, for messages.

    Raises:
        InputError: Neither a count of at least 1 nor a word that is known, or a chunk out of range.
        UnsupportedError: Passes of a model that is not iterated; ``adaptive`` where no bound is known.
    """
    word = passes_word(passes)
    number = whole_number("passes", passes) if word is None and passes is not None else None  # type: ignore[arg-type]
    if not iterated and (number is not None or word == ADAPTIVE):
        raise UnsupportedError("passes: this model has exactly one pass, which is exact; leave passes out")
    if word == ADAPTIVE and plan.residual_bound is None:
        raise UnsupportedError(
            f"{target} has no bound for the residual, so there is no telling when passes may stop: its bundle was "
            "built without a text that the model predicts; give a number of passes or 'exact'"
        )
    own = plan.chunk if number is None and word != EXACT else None
    size = min(own or most, most) if chunk is None else whole_number("chunk", chunk, most=most)
    if number is not None:
        return PrefillRule(passes=None if number == unroll else number, bound=None, shortest=1, chunk=size)
    if iterated and (word == EXACT or (word is None and plan.method == STEPS)):
        return PrefillRule(passes=None, bound=None, shortest=sys.maxsize, chunk=size)
    shortest = plan.shortest if iterated else 1
    if plan.residual_bound is not None and ADAPTIVE in (word, plan.method):
        # Residuals are float32, and so is what they are compared with.
        bound = float(np.float32(min(plan.residual_bound, _LARGEST_BOUND)))
        return PrefillRule(passes=plan.passes or unroll or 1, bound=bound, shortest=shortest, chunk=size)
    # Those that it was built with, the unrolled graph makes in one call.
    return PrefillRule(passes=None if plan.passes == unroll else plan.passes, bound=None, shortest=shortest, chunk=size)


def passes_word(passes: object) -> str | None:
    """The word among the values that ``passes`` may take; None for anything that is not text.

    Raises:
        InputError: Another word.
    """
    if not isinstance(passes, str):
        return None
    if passes not in WORDS:
        raise InputError(f"passes must be a number, 'adaptive' or 'exact', found {shown(passes)}")
    return passes


@dataclass(frozen=True, kw_only=True)
class PrefillCall:
    """A chunk and how it runs.

    Attributes:
        tokens: Per row int64 [length], at least one token each.
        positions: Tokens in the cache of each row before these.
        seq: Length they are padded to.
        model: Its states and sizes.
        passes: None for the graph ``prefill``; else that many calls of ``prefill_pass``, each fed the iterates of the
            one before.
        bound: For one row alone: done as soon as its residual is at most this; where all passes do not get there, the
            rest goes token by token. None: all passes are made.
    """

    tokens: Sequence[np.ndarray]
    positions: Sequence[int]
    seq: int
    model: ModelInfo
    passes: int | None
    bound: float | None = None

    def run(self, engine: Engine, shared: SharedRows) -> np.ndarray | None:
        """Run it; state and caches of the last pass are left where ``shared`` says.

        Returns:
            The residual of the last pass, float32 [rows]; None for a model that is not iterated.
        """
        if self.passes is None:
            return self._run_unrolled(engine, shared)
        chunk = _Iteration(self, engine, shared)
        # After k passes the first k tokens of every row are exact: more passes than tokens change nothing.
        most = min(self.passes, self.seq)
        residual = chunk.run()
        for done in range(1, most):
            if self.bound is not None and (residual <= self.bound).all():
                return residual
            if engine.host_memory:
                chunk.drop(done)
            residual = chunk.run()
        reached = self.bound is None or most == self.seq or (residual <= self.bound).all()
        # NaN is below no bound and gets no better: the caller refuses it.
        return residual if reached or not np.isfinite(residual).all() else chunk.finish(most)

    def _run_unrolled(self, engine: Engine, shared: SharedRows) -> np.ndarray | None:
        own = {
            "input_ids": filled(engine, padded(self.tokens, self.seq)),
            "length": filled(engine, np.asarray([row.size for row in self.tokens], np.int64)),
        }
        for name, (shape, dtype) in own_tensors(self.model, len(self.tokens), self.seq).items():
            own[name] = whole(engine.allocate(shape, dtype))
        bind_by_name(engine.program("prefill"), own, shared)()
        return own["residual"].buffer.read() if "residual" in own else None


def own_tensors(model: ModelInfo, rows: int, seq: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what a graph over a chunk takes and gives that no later call reads, by name.

    Iterates are zeros to start with, as allocated.
    """
    tensors: dict[str, tuple[tuple[int, ...], str]] = {"next_hidden": ((rows, seq, model.hidden_size), "float32")}
    if model.carried.iterated:
        for spec in model.carried.states:
            shape = (rows, seq, *spec.shape)
            tensors[spec.tensor(ITERATE)] = tensors[spec.tensor(NEXT_ITERATE)] = (shape, spec.dtype)
        tensors["residual"] = ((rows,), "float32")
    return tensors


class _Iteration:
    """The tokens of a chunk that are not exact yet, and their iterates: two sets of buffers that passes swap.

    What is exact is dropped: the rest starts at a later position, from the iterates of the last exact token as its
    states.
    """

    def __init__(self, call: PrefillCall, engine: Engine, shared: SharedRows) -> None:
        self._call, self._engine, self._shared = call, engine, shared
        self._states = call.model.carried.states
        self._program = engine.program(_PASS)
        self._ids = padded(call.tokens, call.seq)
        self._lengths = np.asarray([row.size for row in call.tokens], np.int64)
        self._residual = whole(engine.allocate((len(call.tokens),), "float32"))
        self._dropped = 0
        # The first iterates are zeros, as allocated.
        self._begin({}, [self._iterates(call.seq), self._iterates(call.seq)])

    def run(self) -> np.ndarray:
        """One more pass; its residual, float32 [rows]."""
        now, then = self._double_buffer
        launch = self._launches.get(self._turn)
        if launch is None:
            own = {**self._own, **self._bound(now, then), "residual": self._residual}
            launch = self._launches[self._turn] = bind_by_name(self._program, own, self._shared)
        launch()
        self._double_buffer, self._turn = [then, now], 1 - self._turn
        return self._residual.buffer.read()

    def drop(self, exact: int) -> None:
        """Leave out the first tokens of every row, but never the last token of one."""
        first = min(exact, int(self._lengths.min()) - 1)
        if first <= self._dropped:
            return
        states, after = self._cut(first)
        rest = [self._iterates(self._call.seq - first) for _ in range(2)]
        for name, values in after.items():
            rest[0][name].buffer.write(values)
        self._dropped = first
        self._begin({"position": self._position(first), **states}, rest)

    def finish(self, exact: int) -> np.ndarray:
        """Feed what follows the exact tokens of the one row token by token; the residual, float32 [1]."""
        states, _ = self._cut(exact)
        ids, position = filled(self._engine, self._ids[:, :1]), self._position(exact)
        own = {
            "input_ids": ids,
            "length": filled(self._engine, np.ones(1, np.int64)),
            "position": position,
            "residual": self._residual,
        }
        unread, second = self._iterates(1), self._iterates(1)
        double_buffer = [{spec.name: states[spec.tensor(STATE)] for spec in self._states}, second]
        launches = [
            bind_by_name(self._program, {**own, **self._read(now), **self._bound(unread, then)}, self._shared)
            for now, then in (double_buffer, double_buffer[::-1])
        ]
        start = self._call.positions[0]
        for turn, token in enumerate(range(exact, self._call.seq)):
            ids.buffer.write(self._ids[:, token : token + 1])
            position.buffer.write(np.array([start + token], np.int64))
            launches[turn % 2]()
        return self._residual.buffer.read()

    def _begin(self, placed: dict[str, BufferSlice], double_buffer: list[dict[str, BufferSlice]]) -> None:
        """Take new tensors for the tokens that are left; ``placed`` is where they start, if not where the chunk did."""
        own = {
            "input_ids": filled(self._engine, np.ascontiguousarray(self._ids[:, self._dropped :])),
            "length": filled(self._engine, self._lengths - self._dropped),
        }
        self._own = {**own, **placed}
        self._double_buffer = double_buffer
        self._turn = 0
        self._launches: dict[int, Launch] = {}

    def _cut(self, first: int) -> tuple[dict[str, BufferSlice], dict[str, np.ndarray]]:
        """States of the token before ``first`` by the name of their inputs, and iterates from there on by state."""
        states, after = {}, {}
        index = first - self._dropped
        for spec in self._states:
            values = self._double_buffer[0][spec.name].buffer.read()
            states[spec.tensor(STATE)] = filled(self._engine, np.array(values[:, index - 1 : index]))
            after[spec.name] = values[:, index:]
        return states, after

    def _bound(self, now: Mapping[str, BufferSlice], then: Mapping[str, BufferSlice]) -> dict[str, BufferSlice]:
        """What a pass reads and writes, by the names of its tensors."""
        bound = {spec.tensor(ITERATE): now[spec.name] for spec in self._states}
        bound |= {spec.tensor(NEXT_ITERATE): then[spec.name] for spec in self._states}
        if "next_hidden" not in bound:
            seq = next(iter(now.values())).shape[1]
            bound["next_hidden"] = self._allocated((seq, self._call.model.hidden_size), "float32")
        return bound

    def _read(self, states: Mapping[str, BufferSlice]) -> dict[str, BufferSlice]:
        """States by the names of a pass's inputs."""
        return {spec.tensor(STATE): states[spec.name] for spec in self._states}

    def _position(self, first: int) -> BufferSlice:
        return filled(self._engine, np.asarray(self._call.positions, np.int64) + first)

    def _iterates(self, seq: int) -> dict[str, BufferSlice]:
        return {spec.name: self._allocated((seq, *spec.shape), spec.dtype) for spec in self._states}

    def _allocated(self, dims: tuple[int, ...], dtype: str) -> BufferSlice:
        return whole(self._engine.allocate((len(self._call.tokens), *dims), dtype))


def bind_by_name(
    program: Program, own: Mapping[str, BufferSlice], shared: SharedRows, *, repeated: bool = False
) -> Launch:
    """Bind every input and output of a program, from ``own`` or else from the session's tensors."""
    inputs, outputs = (
        {spec.name: own[spec.name] if spec.name in own else shared(spec.name) for spec in specs}
        for specs in (program.inputs, program.outputs)
    )
    return program.bind(inputs, outputs, repeated=repeated)


def filled(engine: Engine, values: np.ndarray) -> BufferSlice:
    """A new tensor that holds these values."""
    buffer = engine.allocate(values.shape, values.dtype.name)
    buffer.write(values)
    return whole(buffer)


def whole(buffer: Buffer) -> BufferSlice:
    """All rows of a buffer."""
    return BufferSlice(buffer, 0, buffer.shape[0])
