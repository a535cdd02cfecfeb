"""INT8 weights as graph files hold them, and their distance from the weights that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crt_export.quantize.plan import LARGEST_SCALE, LEVELS, SMALLEST_SCALE, SMALLEST_STEP

Floats = NDArray[np.float32]

#: A step is a quotient of two float32 values.
_STEP_ERROR = 1e-5
_ZERO = 128
#: Values compared at a time.
_CHUNK = 2**21


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWeight:
    """One linear of ``w8``: blocks uint8 [out, blocks, block_size] with zero at 128, scales float32 [out, blocks]."""

    blocks: NDArray[np.uint8]
    scales: Floats
    into: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), as in the checkpoint."""
        return self.blocks.shape[0], self.into

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        """Values [outs, in], their quantisation steps, and steps that saturation may add to the rounding error."""
        size = self.blocks.shape[2]
        levels = self.blocks[outs].reshape(-1, self.blocks.shape[1] * size)[:, : self.into]
        scale = self.scales[outs][:, np.arange(self.into) // size]
        values = (levels.astype(np.float32) - np.float32(_ZERO)) * scale
        # +128 does not exist: what would round there is stored as 127.
        return values, np.abs(scale), (levels == 255).astype(np.float32) / np.float32(2)

    def steps(self, outs: slice) -> Floats:
        """The stored steps of some outputs, of either sign in the file, [outs, steps per output]."""
        return np.abs(self.scales[outs])

    def expected_steps(self, weight: Floats) -> Floats:
        """The steps that a weight [outs, in] needs, [outs, steps per output]."""
        starts = np.arange(0, self.into, self.blocks.shape[2])
        expected: Floats = (np.maximum.reduceat(np.abs(weight), starts, axis=1) / np.float32(_ZERO)).astype(np.float32)
        return np.where(expected < SMALLEST_STEP, np.float32(0), expected)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnWeight:
    """One linear of ``w8a8``: int8 [in, out], scales float32 [out]; its methods are those of :class:`BlockWeight`."""

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


StoredWeight = BlockWeight | ColumnWeight


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
    rows = max(1, _CHUNK // stored.shape[1])
    for outs in (slice(start, start + rows) for start in range(0, stored.shape[0], rows)):
        expected = weight[outs] * factor
        expected = expected if divisor is None else expected / divisor[outs, None]
        values, step, excess = stored.part(outs)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.abs(values - expected) / step - excess
        # A block of zeros, or of what is none (SMALLEST_STEP), has step 0: anything else is infinitely far from it.
        nothing = (values == expected) | ((values == 0) & (step == 0) & (np.abs(expected) < _ZERO * SMALLEST_STEP))
        distance = np.where(nothing, np.float32(0), np.nan_to_num(distance, nan=np.inf, posinf=np.inf))
        largest = float(distance.max())
        if largest > max(worst, limit):
            place = row, column = np.unravel_index(int(distance.argmax()), distance.shape)
            problem = (
                f"value [out {outs.start + row}, in {column}] is {values[place]:.6g}, the checkpoint's is "
                f"{expected[place]:.6g}: {largest:.3g} quantisation steps apart, expected at most {limit:g}"
            )
        worst = max(worst, largest)
        found, needed = stored.steps(outs), stored.expected_steps(expected)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(found - needed) <= _STEP_ERROR * needed)
        if wrong.any() and problem is None:
            place = row, block = np.unravel_index(int(wrong.argmax()), wrong.shape)
            problem = (
                f"scale of output {outs.start + row}, block {block} is {found[place]:.6g}, its largest weight needs "
                f"{needed[place]:.6g}"
            )
    return worst, problem
