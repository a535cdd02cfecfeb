"""Arrays that several graphs have in common: which they are, and what is made of them, once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[np.generic], ...]


class Memo:
    """What was made of which arrays; an array is known by the memory it lies in, which is kept as long as this is."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Sequence[NDArray[np.generic]], Arrays]] = {}

    def made(self, how: Hashable, sources: Sequence[NDArray[np.generic]], make: Callable[[], Arrays]) -> Arrays:
        """The arrays that ``make`` makes of ``sources``; it is called once for the same ones.

        Args:
            how: Name of the function, and its other arguments.
            sources: What it reads, and nobody writes to.
            make: The function.
        """
        key = (how, *(memory_of(array) for array in sources))
        if key not in self._made:
            self._made[key] = (sources, make())
        return self._made[key][1]


def memory_of(array: NDArray[np.generic]) -> Hashable:
    """Where an array lies and how it is read: equal for two that will always hold the same values."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)
