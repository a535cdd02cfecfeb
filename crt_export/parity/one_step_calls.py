"""Inputs of one call per graph, made by PyTorch FP32, and every output that PyTorch gives for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crt_export.models.base import LanguageModel, State
from crt_export.models.declaration import HIDDEN, ITERATE, NEXT_ITERATE, NEXT_STATE, STATE
from crt_export.parity.reference import PREFILL, STEP
from crt_export.parity.setup import ParityCase, ParitySetup

Arrays = dict[str, NDArray[np.generic]]
#: State name to a tensor of it.
States = Mapping[str, Tensor]

#: Tokens of a prefill call, and the most tokens that are in the cache before it.
_SEQ = 16
_PAST = 64
_ROWS = 4
#: Free slots behind the last one written where the capacity is open; none of them may be touched.
_SPARE = 5
_PADDING_TOKEN = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of one graph.

    Attributes:
        name: What sets it apart, for a failure: ``first iterate zero``.
        rows: What each row is, for a failure: ``position 64, length 8 of 16``.
        inputs: Every input of the contract.
        expected: Every output, float32 or int64; caches up to ``slots`` only, beyond which they must be zero.
        slots: Slots of the caches that any row wrote.
        written: Per row the first slot written and the one after the last; the slots before hold the past.
    """

    name: str
    rows: tuple[str, ...]
    inputs: Arrays
    expected: Arrays
    slots: int = 0
    written: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One sequence of a call: which window, tokens already in the cache, and real tokens of the chunk."""

    window: int
    position: int
    length: int


class OneStepCalls:
    """Calls of every graph of one target, all from the same few windows of text."""

    def __init__(self, case: ParityCase, setup: ParitySetup) -> None:
        self._case, self._model, self._config = case, setup.model, setup.config
        self._reference = setup.reference
        windows = setup.windows
        past = min(windows.length // 2, _PAST)
        self.seq = min(_SEQ, windows.length - past)
        self.past = max(past, 1)
        # Windows repeat where the text has fewer: rows then differ in position and length alone.
        chosen = [row % windows.count for row in range(_ROWS)]
        trace = setup.reference.trace(windows.inputs[chosen][:, : self.past + self.seq])
        self._ids, self._hidden, self._states = torch.from_numpy(trace.ids), trace.hidden, trace.states
        self._keys = [self._as_cached(keys) for keys in trace.keys]
        # A cache of values is smoothed in some precisions: both what goes in and what is expected to come out.
        self._smoothing = [torch.from_numpy(factor) for factor in case.value_divisors(setup.config)]
        smoothed = [values / factor for values, factor in zip(trace.values, self._smoothing, strict=True)]
        self._values = [self._as_cached(values) for values in smoothed]
        self.capacity = case.capacity or self.past + self.seq + _SPARE

    @property
    def positions(self) -> list[int]:
        """Tokens in the cache before any of the calls, sorted."""
        rows = [*self._first_tokens(), *self._middle_tokens(), *self._chunks()]
        return sorted({row.position for row in rows})

    def of(self, graph: str) -> Iterator[Call]:
        """The calls of one graph."""
        if graph == "head":
            yield self._head_call()
        elif graph == STEP:
            yield self._call("empty cache", self._first_tokens(), 1, 1)
            yield self._call("middle of the text", self._middle_tokens(), 1, 1)
        else:
            passes = self._case.unroll if graph == PREFILL else 1
            rows = self._chunks()
            yield self._call("first iterate zero", rows, self.seq, passes)
            if self._config.carried.iterated:
                yield self._call("first iterate of another text", rows, self.seq, passes, self._first_iterate(rows))

    def _first_tokens(self) -> list[Row]:
        return [Row(window=row, position=0, length=1) for row in range(_ROWS)]

    def _middle_tokens(self) -> list[Row]:
        """Rows of one call need not be equally far."""
        positions = (self.past, max(1, self.past // 2), self.past, 1)
        return [Row(window=row, position=position, length=1) for row, position in enumerate(positions)]

    def _chunks(self) -> list[Row]:
        """A start, a continuation, one padded on the right, and one with nothing but padding."""
        half = (self.seq + 1) // 2
        return [
            Row(window=0, position=0, length=self.seq),
            Row(window=1, position=self.past, length=self.seq),
            Row(window=2, position=self.past, length=half),
            Row(window=3, position=max(1, self.past // 2), length=0),
        ]

    def _first_iterate(self, rows: list[Row]) -> States:
        """True states, but of the next row's text: as large as real ones, and wrong."""
        return {
            name: torch.stack(
                [values[(row.window + 1) % len(values), row.position : row.position + self.seq] for row in rows]
            )
            for name, values in self._states.items()
        }

    def _as_cached(self, tensor: Tensor) -> Tensor:
        """Rounded to the dtype of the target's caches: both sides then start from the same values."""
        return tensor.to(getattr(torch, self._case.cache_dtype)).float()

    def _state(self, rows: list[Row]) -> State:
        """What rows of one position continue from."""
        windows, position = [row.window for row in rows], rows[0].position
        return State(
            states={
                name: values[windows, position - 1 : position] if position else values[windows, :1] * 0
                for name, values in self._states.items()
            },
            keys=tuple(keys[windows, :, :position] for keys in self._keys),
            values=tuple(
                values[windows, :, :position] * factor
                for values, factor in zip(self._values, self._smoothing, strict=True)
            ),
            position=torch.full((len(rows),), position),
        )

    def _call(self, name: str, rows: list[Row], seq: int, passes: int, iterate: States | None = None) -> Call:
        ids = torch.stack([self._ids[row.window, row.position : row.position + seq] for row in rows])
        for own, row in zip(ids, rows, strict=True):
            own[row.length :] = _PADDING_TOKEN
        if iterate is None:
            iterate = {
                name: values.new_zeros(len(rows), seq, *values.shape[2:]) for name, values in self._states.items()
            }
        expected: Arrays = {}
        inputs = self._inputs(rows, ids, iterate)
        slots = max(row.position for row in rows) + seq
        for group in _by_position(rows):
            part = [rows[index] for index in group]
            first = {state: values[group] for state, values in iterate.items()}
            outputs = self._outputs(ids[group], self._state(part), first, part, passes)
            for output, values in outputs.items():
                if output.endswith(".value"):
                    values = values / self._smoothing[int(output.split(".")[1])].numpy()
                if output.startswith("present"):
                    values = self._placed(values, slots)
                expected.setdefault(output, np.zeros((len(rows), *values.shape[1:]), values.dtype))[group] = values
        return Call(
            name=name,
            rows=tuple(f"position {row.position}, length {row.length} of {seq}" for row in rows),
            inputs=inputs,
            expected=expected,
            slots=slots,
            written=tuple((row.position, row.position + seq) for row in rows),
        )

    def _outputs(self, ids: Tensor, state: State, iterate: States, rows: list[Row], passes: int) -> Arrays:
        """:func:`reference_outputs`, once for all targets and checks that call with the very same values."""
        given = (ids, *state.states.values(), state.position, *iterate.values(), *state.keys, *state.values)
        digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in given))
        shapes = tuple(tensor.shape for tensor in given)
        key = ("one-step", digest.digest(), shapes, tuple(row.length for row in rows), passes)
        return self._reference.once(key, lambda: reference_outputs(self._model, ids, state, iterate, rows, passes))

    def _inputs(self, rows: list[Row], ids: Tensor, iterate: States) -> Arrays:
        inputs: Arrays = {
            "input_ids": ids.numpy(),
            "position": np.array([row.position for row in rows]),
            "length": np.array([row.length for row in rows]),
        }
        started = [self._state([row]).states for row in rows]
        for spec in self._config.carried.states:
            inputs[spec.tensor(STATE)] = torch.cat([states[spec.name] for states in started]).numpy()
            inputs[spec.tensor(ITERATE)] = iterate[spec.name].numpy()
        for index in range(len(self._config.carried.caches)):
            for kind, cached in (("key", self._keys), ("value", self._values)):
                parts = [cached[index][row.window : row.window + 1, :, : row.position].numpy() for row in rows]
                placed = np.concatenate([self._placed(part, self.capacity) for part in parts])
                inputs[f"past_key_values.{index}.{kind}"] = placed.astype(self._case.cache_dtype)
        return inputs

    def _placed(self, cache: NDArray[np.generic], slots: int) -> NDArray[np.generic]:
        """[batch, heads, used, head_dim] in the first slots of a zeroed cache."""
        whole = np.zeros((*cache.shape[:2], slots, cache.shape[3]), cache.dtype)
        whole[:, :, : cache.shape[2]] = cache
        return whole

    @torch.no_grad()
    def _head_call(self) -> Call:
        hidden = self._hidden[:, : self.seq].contiguous()
        return Call(
            name="hidden states of the recurrence",
            rows=tuple(f"row {row}" for row in range(len(hidden))),
            inputs={"hidden": hidden.numpy()},
            expected={"logits": self._model.head(hidden).numpy()},
        )


@torch.no_grad()
def reference_outputs(
    model: LanguageModel, ids: Tensor, state: State, iterate: States, rows: list[Row], passes: int
) -> Arrays:
    """Every output of the contract for rows of one position, from the equations alone.

    Args:
        model: PyTorch FP32.
        ids: int64 [batch, seq], right-padded.
        state: What the rows continue from.
        iterate: State name to the first iterate, float32 [batch, seq, *shape].
        rows: Their real lengths.
        passes: K, of a model that is iterated.

    Returns:
        float32 and int64 arrays by output name; caches hold position + seq slots.
    """
    carried, lengths = model.carried, [row.length for row in rows]
    before = iterate
    if carried.iterated and passes > 1:
        before = model.unroll(ids, passes - 1, state, iterate)[0].states
    done, after, _ = model.unroll(ids, 1, state, before)
    last = {name: _at(torch.cat([state.states[name], done.states[name]], dim=1), lengths) for name in done.states}
    hidden = last[HIDDEN] if HIDDEN in last else _at(done.hidden, [max(length - 1, 0) for length in lengths])
    logits = model.head(hidden)[:, 0]
    outputs: dict[str, Tensor] = {
        "logits": logits,
        "next_token": logits.argmax(dim=-1, keepdim=True),
        "next_position": state.position + torch.tensor(lengths),
        "next_hidden": done.hidden,
    }
    for spec in carried.states:
        outputs[spec.tensor(NEXT_STATE)] = last[spec.name]
        outputs[spec.tensor(NEXT_ITERATE)] = done.states[spec.name]
    if carried.iterated:
        changes = [(done.states[name] - before[name]).abs().flatten(2).amax(-1) for name in done.states]
        change = torch.stack(changes).amax(0)
        largest = [
            values[:length].amax() if length else values.new_zeros(())
            for values, length in zip(change, lengths, strict=True)
        ]
        outputs["residual"] = torch.stack(largest)
    for index, (keys, values) in enumerate(zip(after.keys, after.values, strict=True)):
        outputs |= {f"present_key_values.{index}.key": keys, f"present_key_values.{index}.value": values}
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def _at(values: Tensor, indices: list[int]) -> Tensor:
    """Of every row one token's values, [batch, 1, *shape]."""
    return torch.stack([row[index] for row, index in zip(values, indices, strict=True)])[:, None]


def _by_position(rows: list[Row]) -> list[list[int]]:
    """Indices of the rows that stand at one position, which the reference takes together."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.position, []).append(index)
    return [*groups.values()]
