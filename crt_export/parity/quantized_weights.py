"""INT8 weights as they are stored, seen as what they stand for: values, quantisation steps, factors folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crt_export.quantize.ranges import LARGEST_SCALE, LEVELS, SMALLEST_SCALE, SMALLEST_STEP

Floats = NDArray[np.float32]
#: ``log2`` of the factors that smoothing may fold, see :mod:`crt_export.quantize.smooth`.
EXPONENTS = np.arange(-12, 41)
#: A step is a quotient of two float32 values.
STEP_ERROR = 1e-5
_ZERO = 128
#: Values compared at a time.
_CHUNK = 2**21


class StoredWeight(Protocol):
    """One quantised linear, in the checkpoint's orientation [out, in]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    def part(self, outs: slice, ins: slice | NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
        """Values [outs, ins], their quantisation steps, and steps that saturation may add to the rounding error."""
        ...

    def steps(self, outs: slice) -> Floats:
        """The stored steps of some outputs, [outs, steps per output]."""
        ...

    def due_steps(self, weight: Floats) -> Floats:
        """The steps that a weight [outs, in] asks for, [outs, steps per output]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWeight:
    """``w8``: blocks uint8 [out, blocks, block_size] with zero at 128, scales float32 [out, blocks] of either sign."""

    blocks: NDArray[np.uint8]
    scales: Floats
    into: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0], self.into

    def part(self, outs: slice, ins: slice | NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
        size = self.blocks.shape[2]
        block = np.arange(self.into)[ins] // size
        levels = self.blocks[outs].reshape(-1, self.blocks.shape[1] * size)[:, : self.into][:, ins]
        scale = self.scales[outs][:, block]
        values = (levels.astype(np.float32) - np.float32(_ZERO)) * scale
        # +128 does not exist: what would round there is stored as 127.
        return values, np.abs(scale), (levels == 255).astype(np.float32) / np.float32(2)

    def steps(self, outs: slice) -> Floats:
        return np.abs(self.scales[outs])

    def due_steps(self, weight: Floats) -> Floats:
        starts = np.arange(0, self.into, self.blocks.shape[2])
        largest: Floats = np.maximum.reduceat(np.abs(weight), starts, axis=1)
        due: Floats = (largest / np.float32(_ZERO)).astype(np.float32)
        return np.where(due < SMALLEST_STEP, np.float32(0), due)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnWeight:
    """``w8a8``: int8 [in, out], scales float32 [out]."""

    integers: NDArray[np.int8]
    scales: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[1], self.integers.shape[0]

    def part(self, outs: slice, ins: slice | NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
        scale = self.scales[outs][:, None]
        return self.integers[:, outs][ins].T.astype(np.float32) * scale, scale, np.zeros((1, 1), np.float32)

    def steps(self, outs: slice) -> Floats:
        return self.scales[outs][:, None]

    def due_steps(self, weight: Floats) -> Floats:
        largest = np.abs(weight).max(axis=1, keepdims=True)
        due = np.clip(largest / np.float32(LEVELS), SMALLEST_SCALE, LARGEST_SCALE)
        return np.where(largest > 0, due, np.float32(1)).astype(np.float32)

    def column_sums(self) -> NDArray[np.float64]:
        """Sum of each output's dequantised weights, [out]."""
        return self.integers.sum(axis=0, dtype=np.int64) * self.scales.astype(np.float64)


def deviation(
    stored: StoredWeight, weight: Floats, factor: Floats, divisor: Floats | None = None, *, limit: float
) -> tuple[float, str | None]:
    """How far a stored weight is from what it must stand for.

    Args:
        stored: The weight in the file.
        weight: The checkpoint's, [out, in].
        factor: What smoothing multiplied each input by, [in].
        divisor: What smoothing divided each output by, [out]; None for nothing.
        limit: Largest distance, quantisation steps.

    Returns:
        The largest distance in quantisation steps, less what saturation explains, and a sentence on the worst value
        if it is more than the limit or if a step is not the one its largest value asks for.
    """
    worst, problem = 0.0, None
    for outs in _chunks(stored.shape):
        due = weight[outs] * factor
        if divisor is not None:
            due = due / divisor[outs, None]
        values, step, excess = stored.part(outs, slice(None))
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.abs(values - due) / step - excess
        # A block of zeros, or of what is none (SMALLEST_STEP), has step 0: anything else is infinitely far from it.
        nothing = (values == due) | ((values == 0) & (step == 0) & (np.abs(due) < _ZERO * SMALLEST_STEP))
        distance = np.where(nothing, np.float32(0), np.nan_to_num(distance, nan=np.inf, posinf=np.inf))
        largest = float(distance.max())
        if largest > max(worst, limit):
            row, column = np.unravel_index(int(distance.argmax()), distance.shape)
            problem = (
                f"value [out {outs.start + row}, in {column}] is {values[row, column]:.6g}, the checkpoint's is "
                f"{due[row, column]:.6g}: {largest:.3g} quantisation steps apart, expected at most {limit:g}"
            )
        worst = max(worst, largest)
        problem = problem or _step_problem(stored.steps(outs), stored.due_steps(due), outs.start)
    return worst, problem


def _step_problem(found: Floats, due: Floats, start: int) -> str | None:
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(found - due) <= STEP_ERROR * due)
    if not wrong.any():
        return None
    row, block = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (
        f"scale of output {start + row}, block {block} is {found[row, block]:.6g}, its largest weight asks for "
        f"{due[row, block]:.6g}"
    )


def folded_exponents(
    pairs: Sequence[tuple[Floats, NDArray[np.floating]]],
    cost: Callable[[NDArray[np.intp], int], Floats],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Which power of two divided each channel of some vectors.

    Args:
        pairs: Vectors of the checkpoint and of the file, [channels]; the file's are divided and rounded to their dtype.
        cost: For some channels and an exponent, how badly it explains the weights around; decides only where several
            exponents explain the vectors, which takes a channel of zeros.

    Returns:
        The exponents, and for which channels some exponent explains the vectors to the last bit.
    """
    with np.errstate(over="ignore", under="ignore"):
        matches = np.all(
            [
                [(original * np.float32(2.0**-exponent)).astype(found.dtype) == found for exponent in EXPONENTS]
                for original, found in pairs
            ],
            axis=0,
        )
    explained = matches.any(axis=0)
    # Where nothing fits, the nearest power of two, so that the weights are judged on their own.
    best = np.where(explained, EXPONENTS[matches.argmax(axis=0)], _nearest_exponents(pairs))
    unsure = np.flatnonzero(matches.sum(axis=0) > 1)
    if len(unsure):
        costs = np.stack([np.asarray(cost(unsure, int(exponent)), np.float64) for exponent in EXPONENTS])
        costs[~matches[:, unsure]] = np.inf
        # Of equally good ones the smallest in size: a channel without weights is not smoothed.
        order = np.argsort(np.abs(EXPONENTS), kind="stable")
        best[unsure] = EXPONENTS[order][costs[order].argmin(axis=0)]
    return best, explained


def _nearest_exponents(pairs: Sequence[tuple[Floats, NDArray[np.floating]]]) -> NDArray[np.int64]:
    ratio = np.ones(pairs[0][0].shape, np.float64)
    for original, found in pairs:
        usable = (ratio == 1) & (original != 0) & (found != 0) & np.isfinite(found)
        ratio[usable] = np.abs(original[usable].astype(np.float64) / found[usable].astype(np.float64))
    return np.clip(np.rint(np.log2(ratio)), EXPONENTS[0], EXPONENTS[-1]).astype(np.int64)


def _chunks(shape: tuple[int, int]) -> Iterator[slice]:
    rows = max(1, _CHUNK // shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
