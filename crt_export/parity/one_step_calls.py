"""Inputs of one call per graph, made by PyTorch FP32, and every output that PyTorch gives for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crt_export.models.base import LanguageModel, State
from crt_export.parity.reference import PREFILL, STEP
from crt_export.parity.setup import ParityCase, ParitySetup

Arrays = dict[str, NDArray[np.generic]]

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
        self._ids, self._hidden = torch.from_numpy(trace.ids), trace.hidden
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
            if self._config.recurrent:
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

    def _first_iterate(self, rows: list[Row]) -> Tensor:
        """True hidden states, but of the next row's text: as large as real ones, and wrong."""
        size = self._hidden.shape[0]
        parts = [self._hidden[(row.window + 1) % size, row.position : row.position + self.seq].clone() for row in rows]
        return torch.stack(parts)

    def _as_cached(self, tensor: Tensor) -> Tensor:
        """Rounded to the dtype of the target's caches: both sides then start from the same values."""
        return tensor.to(getattr(torch, self._case.cache_dtype)).float()

    def _carry(self, rows: list[Row]) -> State:
        """What rows of one position continue from."""
        windows, position = [row.window for row in rows], rows[0].position
        state = self._hidden[windows, position - 1 : position] if position else self._hidden[windows, :1] * 0
        return State(
            state=state,
            keys=tuple(keys[windows, :, :position] for keys in self._keys),
            values=tuple(
                values[windows, :, :position] * factor
                for values, factor in zip(self._values, self._smoothing, strict=True)
            ),
            position=torch.full((len(rows),), position),
        )

    def _call(self, name: str, rows: list[Row], seq: int, passes: int, iterate: Tensor | None = None) -> Call:
        ids = torch.stack([self._ids[row.window, row.position : row.position + seq] for row in rows])
        for own, row in zip(ids, rows, strict=True):
            own[row.length :] = _PADDING_TOKEN
        iterate = torch.zeros(len(rows), seq, self._config.hidden_size) if iterate is None else iterate
        expected: Arrays = {}
        inputs = self._inputs(rows, ids, iterate)
        slots = max(row.position for row in rows) + seq
        for group in _by_position(rows):
            part = [rows[index] for index in group]
            outputs = self._outputs(ids[group], self._carry(part), iterate[group], part, passes)
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

    def _outputs(self, ids: Tensor, carry: State, iterate: Tensor, rows: list[Row], passes: int) -> Arrays:
        """:func:`reference_outputs`, once for all targets and checks that call with the very same values."""
        given = (ids, carry.state, carry.position, iterate, *carry.keys, *carry.values)
        digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in given))
        shapes = tuple(tensor.shape for tensor in given)
        key = ("one-step", digest.digest(), shapes, tuple(row.length for row in rows), passes)
        return self._reference.once(key, lambda: reference_outputs(self._model, ids, carry, iterate, rows, passes))

    def _inputs(self, rows: list[Row], ids: Tensor, iterate: Tensor) -> Arrays:
        inputs: Arrays = {
            "input_ids": ids.numpy(),
            "position": np.array([row.position for row in rows]),
            "length": np.array([row.length for row in rows]),
            "state": torch.cat([self._carry([row]).state for row in rows]).numpy(),
            "hidden": iterate.numpy(),
        }
        for layer in range(self._config.num_hidden_layers):
            for kind, cached in (("key", self._keys), ("value", self._values)):
                parts = [cached[layer][row.window : row.window + 1, :, : row.position].numpy() for row in rows]
                placed = np.concatenate([self._placed(part, self.capacity) for part in parts])
                inputs[f"past_key_values.{layer}.{kind}"] = placed.astype(self._case.cache_dtype)
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
    model: LanguageModel, ids: Tensor, carry: State, iterate: Tensor, rows: list[Row], passes: int
) -> Arrays:
    """Every output of the contract for rows of one position, from the equations alone.

    Args:
        model: PyTorch FP32.
        ids: int64 [batch, seq], right-padded.
        carry: What the rows continue from.
        iterate: First iterate, float32 [batch, seq, hidden].
        rows: Their real lengths.
        passes: K.

    Returns:
        float32 and int64 arrays by output name; caches hold position + seq slots.
    """
    recurrent = model.config.recurrent
    passes = passes if recurrent else 1
    before = model.unroll(ids, passes - 1, carry, iterate)[0] if passes > 1 else iterate
    h, after, _ = model.unroll(ids, 1, carry, before)
    states = torch.cat([carry.state, h], dim=1)
    last = torch.stack(
        [states[index, row.length] if recurrent else h[index, max(row.length - 1, 0)] for index, row in enumerate(rows)]
    )[:, None]
    logits = model.head(last)[:, 0]
    outputs: dict[str, Tensor] = {
        "logits": logits,
        "next_token": logits.argmax(dim=-1, keepdim=True),
        "next_position": carry.position + torch.tensor([row.length for row in rows]),
        "next_state": last,
        "next_hidden": h,
        "residual": torch.stack(
            [
                (h - before)[index, : row.length].abs().amax() if row.length else h.new_zeros(())
                for index, row in enumerate(rows)
            ]
        ),
    }
    for layer, (keys, values) in enumerate(zip(after.keys, after.values, strict=True)):
        outputs |= {f"present_key_values.{layer}.key": keys, f"present_key_values.{layer}.value": values}
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def _by_position(rows: list[Row]) -> list[list[int]]:
    """Indices of the rows that stand at one position, which the reference takes together."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.position, []).append(index)
    return [*groups.values()]
