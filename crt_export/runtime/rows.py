"""Rows of a batch: which tokens each brings, and which neighbours share one call of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from crt_export.checked import shown
from crt_export.errors import InputError, problem_list
from crt_export.runtime.history import NO_TOKEN

_NONE = np.zeros(0, np.int64)
_INTEGERS = (int, np.integer)
_BOOLS = frozenset({bool, np.bool_})


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring rows ``start`` to ``stop`` that run in one call, right-padded to ``seq`` tokens."""

    start: int
    stop: int
    seq: int


def token_rows(rows: Sequence[Sequence[int] | np.ndarray], *, batch: int, vocab: int) -> list[np.ndarray]:
    """Check token ids and make each row int64 [length]; a row may be empty.

    Raises:
        InputError: Not ``batch`` rows, not integers, or ids outside the vocabulary; lists every problem.
    """
    given = items(rows)
    if given is None:
        raise InputError(f"expected {batch} rows of token ids such as [[1, 2, 3]], found {kind_of(rows)}")
    if len(given) != batch:
        raise InputError(f"expected one row of token ids per sequence: batch is {batch}, found {len(given)} rows")
    arrays: list[np.ndarray] = []
    problems: list[str] = []
    for index, row in enumerate(given):
        array, problem = _token_row(row, vocab)
        arrays.append(array)
        if problem:
            problems.append(f"row {index}: {problem}")
    if problems:
        raise InputError(problem_list("token ids", problems))
    return arrays


def continuing_rows(
    rows: Sequence[Sequence[int] | np.ndarray], positions: Sequence[int], *, vocab: int
) -> list[np.ndarray]:
    """Check prompts as :func:`token_rows` does; a row without any must hold tokens to go on from.

    Raises:
        InputError: As token_rows(), or a row has no tokens in its prompt and none in the cache.
    """
    tokens = token_rows(rows, batch=len(positions), vocab=vocab)
    problems = [
        f"row {row}: empty prompt, and the row holds no tokens to go on from"
        for row, (fed, position) in enumerate(zip(tokens, positions, strict=True))
        if not fed.size and not position
    ]
    if problems:
        raise InputError(problem_list("generate needs something to continue in every row", problems))
    return tokens


def step_tokens(tokens: Sequence[int | None] | np.ndarray, *, batch: int, vocab: int) -> list[int]:
    """Check one token id per row; ``NO_TOKEN`` where a row has None.

    Raises:
        InputError: Not ``batch`` values, none at all, not integers, or ids outside the vocabulary; lists every
            problem.
    """
    given = tokens if type(tokens) is list else items(tokens)
    if given is None:
        raise InputError(f"expected one token id per row such as [4], found {kind_of(tokens)}")
    if len(given) != batch:
        raise InputError(f"expected one token id per row: batch is {batch}, found {len(given)}")
    ids, problems = [NO_TOKEN] * batch, []
    for row, token in enumerate(given):
        if token is None:
            continue
        if not isinstance(token, _INTEGERS) or isinstance(token, bool):
            problems.append(f"row {row}: expected an integer, found {shown(token)}")
        elif not 0 <= token < vocab:
            problems.append(f"row {row}: token id {shown(token)} is outside the vocabulary (0 to {vocab - 1})")
        else:
            ids[row] = int(token)
    if problems:
        raise InputError(problem_list("token ids", problems))
    if max(ids) == NO_TOKEN:
        raise InputError("step needs a token in at least one row")
    return ids


def capacity_problems(positions: Sequence[int], lengths: Sequence[int], capacity: int) -> list[str]:
    """Rows whose new tokens do not fit behind those already in the cache."""
    return [
        f"row {row}: {position} tokens in the cache and {length} more exceed the capacity of {capacity}"
        for row, (position, length) in enumerate(zip(positions, lengths, strict=True))
        if position + length > capacity
    ]


def batches_from_lengths(
    positions: Sequence[int],
    lengths: Sequence[int],
    capacity: int,
    *,
    rows_are_independent: bool = True,
    pads: bool = True,
) -> list[Batch]:
    """Join neighbouring rows with tokens; rows without tokens take no part, nothing of them is read or written.

    Args:
        positions: Tokens in the cache of each row.
        lengths: Tokens that each row brings.
        capacity: Most tokens of a row. Padding is written to the cache as well, so a row joins only if no row of the
            batch would pass it.
        rows_are_independent: False runs each row alone.
        pads: Whether rows that bring different numbers of tokens join too, padded to the longest. Padding changes the
            shape of every product, and with it the order of sums: on ONNX Runtime's CPU a row then has other bits than
            alone. Rows of equal numbers have the same, in any batch (validate/unit/runtime/test_rows_alone.py).
    """
    batches: list[Batch] = []
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        last = batches[-1] if batches else None
        if rows_are_independent and last is not None and last.stop == row and (pads or last.seq == length):
            seq = max(last.seq, length)
            if max(positions[last.start : row + 1]) + seq <= capacity:
                batches[-1] = Batch(last.start, row + 1, seq)
                continue
        batches.append(Batch(row, row + 1, length))
    return batches


def padded(rows: Sequence[np.ndarray], seq: int) -> np.ndarray:
    """Rows as int64 [len(rows), seq], zeros behind each."""
    ids = np.zeros((len(rows), seq), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : tokens.size] = tokens
    return ids


def _token_row(row: object, vocab: int) -> tuple[np.ndarray, str]:
    if isinstance(row, str | bytes | bytearray):
        return _NONE, "expected token ids, found text; encode it with bundle.tokenizer"
    given = row if type(row) is np.ndarray else items(row)  # a masked array hides some of its items
    if given is None:
        found = "a single value" if isinstance(row, int | float | np.number) else kind_of(row)
        return _NONE, f"expected a flat list of token ids, found {found}"
    try:
        array = np.asarray(given)
    except Exception:  # ragged, too large a number, or an object of the caller's
        return _NONE, "expected a flat list of token ids"
    if array.ndim != 1:
        found = "a single value" if array.ndim == 0 else f"shape {list(array.shape)}"
        return _NONE, f"expected a flat list of token ids, found {found}"
    if array.size == 0:
        return _NONE, ""
    if given is not row and not _BOOLS.isdisjoint(map(type, given)):  # among numbers numpy makes them 0 and 1
        return _NONE, "expected integers, found True or False among them"
    if array.dtype.kind not in "iu":
        return _NONE, f"expected integers, found {array.dtype} values such as {shown(array[0])}"
    outside = np.flatnonzero((array < 0) | (array >= vocab))
    if outside.size:
        first = int(outside[0])
        return _NONE, f"token id {array[first]} at index {first} is outside the vocabulary (0 to {vocab - 1})"
    return array.astype(np.int64), ""


def items(values: object) -> list[object] | None:
    """The items of a list, tuple, array or other sequence, in its order; None if it is none.

    Text is none, though it has items, nor is a dict or a set, which have no order that means anything, nor what may be
    read only once.
    """
    if isinstance(values, AbstractSet) or not hasattr(values, "__len__"):
        return None
    return read_once(values)


def read_once(values: object) -> list[object] | None:
    """The items of anything that can be iterated but text and dicts; None if it cannot be."""
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping):
        return None
    if isinstance(values, np.ndarray):
        # numpy's integers are slow to look at one by one, and a greedy loop feeds what next_tokens gave it.
        if values.ndim == 0 or values.dtype.kind == "V":
            return None
        return values.tolist() if values.ndim == 1 else list(values)
    try:
        return list(values) if isinstance(values, Iterable) else None
    except Exception:  # an object of the caller's that says it can, and cannot
        return None


def kind_of(value: object) -> str:
    """The type of a value for a message, of an array with its shape."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    return type(value).__name__
