"""INT8 weights as they are stored, and how far what they stand for is from what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crt_export.quantize.plan import LARGEST_SCALE, LEVELS, SMALLEST_SCALE, SMALLEST_STEP

Floats = NDArray[np.float32]
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

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        """Values [outs, in], their quantisation steps, and steps that saturation may add to the rounding error."""
        ...

    def steps(self, outs: slice) -> Floats:
        """The stored steps of some outputs, [outs, steps per output]."""
        ...

    def expected_steps(self, weight: Floats) -> Floats:
        """The steps that a weight [outs, in] needs, [outs, steps per output]."""
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

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        size = self.blocks.shape[2]
        levels = self.blocks[outs].reshape(-1, self.blocks.shape[1] * size)[:, : self.into]
        scale = self.scales[outs][:, np.arange(self.into) // size]
        values = (levels.astype(np.float32) - np.float32(_ZERO)) * scale
        # +128 does not exist: what would round there is stored as 127.
        return values, np.abs(scale), (levels == 255).astype(np.float32) / np.float32(2)

    def steps(self, outs: slice) -> Floats:
        return np.abs(self.scales[outs])

    def expected_steps(self, weight: Floats) -> Floats:
        starts = np.arange(0, self.into, self.blocks.shape[2])
        largest: Floats = np.maximum.reduceat(np.abs(weight), starts, axis=1)
        expected: Floats = (largest / np.float32(_ZERO)).astype(np.float32)
        return np.where(expected < SMALLEST_STEP, np.float32(0), expected)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnWeight:
    """``w8a8``: int8 [in, out], scales float32 [out]."""

    integers: NDArray[np.int8]
    scales: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[1], self.integers.shape[0]

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        scale = self.scales[outs][:, None]
        return self.integers[:, outs].T.astype(np.float32) * scale, scale, np.zeros((1, 1), np.float32)

    def steps(self, outs: slice) -> Floats:
        return self.scales[outs][:, None]

    def expected_steps(self, weight: Floats) -> Floats:
        largest = np.abs(weight).max(axis=1, keepdims=True)
        expected = np.clip(largest / np.float32(LEVELS), SMALLEST_SCALE, LARGEST_SCALE)
        return np.where(largest > 0, expected, np.float32(1)).astype(np.float32)

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
        expected = weight[outs] * factor
        if divisor is not None:
            expected = expected / divisor[outs, None]
        values, step, excess = stored.part(outs)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.abs(values - expected) / step - excess
        # A block of zeros, or of what is none (SMALLEST_STEP), has step 0: anything else is infinitely far from it.
        nothing = (values == expected) | ((values == 0) & (step == 0) & (np.abs(expected) < _ZERO * SMALLEST_STEP))
        distance = np.where(nothing, np.float32(0), np.nan_to_num(distance, nan=np.inf, posinf=np.inf))
        largest = float(distance.max())
        if largest > max(worst, limit):
            row, column = np.unravel_index(int(distance.argmax()), distance.shape)
            problem = (
                f"value [out {outs.start + row}, in {column}] is {values[row, column]:.6g}, the checkpoint's is "
                f"{expected[row, column]:.6g}: {largest:.3g} quantisation steps apart, expected at most {limit:g}"
            )
        worst = max(worst, largest)
        problem = problem or _step_problem(stored.steps(outs), stored.expected_steps(expected), outs.start)
    return worst, problem


def _step_problem(found: Floats, expected: Floats, start: int) -> str | None:
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(found - expected) <= STEP_ERROR * expected)
    if not wrong.any():
        return None
    row, block = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (
        f"scale of output {start + row}, block {block} is {found[row, block]:.6g}, its largest weight needs "
        f"{expected[row, block]:.6g}"
    )


def _chunks(shape: tuple[int, int]) -> Iterator[slice]:
    rows = max(1, _CHUNK // shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
