"""From a tensor of the source to one of ours: which rows of it, in which order, times what.

Rows are picked, channels reordered and norms copied in the dtype that they are stored in. Whatever is multiplied or
shifted is computed and written in float32: folded into BF16 it would be another model by 2^-9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Values of a block: what is in memory besides the tensor itself.
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tensor of a checkpoint is made.

    Attributes:
        shape: Of the result.
        sources: Tensors of the source, one below the other; none makes a constant.
        source_shape: What each of them has to be.
        rows: Which rows, or values of a vector, in which order, int64; None: all as they are.
        transposed: Whether the source is [in, out].
        flat: Whether the source is read as one vector.
        scale: Factor of all, or of each row.
        shift: Added before that.
        fill: The constant.
        start: Makes a tensor that no source has.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    source_shape: tuple[int, ...] = ()
    rows: Tensor | None = None
    transposed: bool = False
    flat: bool = False
    scale: float | Tensor = 1.0
    shift: float = 0.0
    fill: float = 0.0
    start: Callable[[], Tensor] | None = None

    @property
    def folded(self) -> bool:
        """Whether it is computed, in float32."""
        return isinstance(self.scale, Tensor) or self.scale != 1.0 or self.shift != 0.0

    def dtype(self, stored: torch.dtype | None) -> torch.dtype:
        """Of the result.

        Args:
            stored: Of the source; None for a constant.
        """
        return torch.float32 if self.folded or stored is None else stored

    def blocks(self, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """The result in blocks of rows, contiguous, in its dtype.

        Args:
            read: Reads a tensor of the source.
        """
        if not self.sources:
            yield self.start() if self.start else torch.full(self.shape, self.fill)
            return
        found = [read(name) for name in self.sources]
        source = found[0] if len(found) == 1 else torch.cat([tensor.flatten() for tensor in found])
        del found
        if self.flat:
            source = source.flatten()
        if self.transposed:
            source = source.T
        count = len(source) if self.rows is None else len(self.rows)
        step = max(1, _BLOCK // max(1, math.prod(source.shape[1:])))
        for first in range(0, count, step):
            last = min(count, first + step)
            block = source[first:last] if self.rows is None else source[self.rows[first:last]]
            yield self._folded(block, first, last).contiguous()

    def _folded(self, block: Tensor, first: int, last: int) -> Tensor:
        if not self.folded:
            return block
        values = block.float() + self.shift if self.shift else block.float()
        scale = self.scale
        if isinstance(scale, float | int):
            return values * scale
        factors = scale[first:last]
        return values * (factors[:, None] if values.ndim == 2 else factors)

    def tensor(self, read: Callable[[str], Tensor]) -> Tensor:
        """The whole result."""
        return torch.cat(list(self.blocks(read))).reshape(self.shape)


def half_order(head_dim: int, channels: int) -> Tensor:
    """Channels of a head in the order in which all of them form pairs (j, j + head_dim/2).

    A family that turns only the first ``channels`` pairs (j, j + channels/2) among them; their pairs come first here,
    then those that are not turned, whose frequency is 0.
    """
    turned, passed = torch.arange(channels), torch.arange(channels, head_dim)
    return torch.cat([*(torch.cat([a, b]) for a, b in zip(turned.chunk(2), passed.tensor_split(2), strict=True))])


def block_rows(sizes: tuple[int, ...], index: int) -> Tensor:
    """Rows of one of several blocks, one after another."""
    first = sum(sizes[:index])
    return torch.arange(first, first + sizes[index])


def group_rows(groups: int, queries: int, head_dim: int, index: int) -> Tensor:
    """Rows of queries (0), keys (1) or values (2) where each group holds its queries, then its key, then its value."""
    rows = torch.arange(groups * (queries + 2) * head_dim).reshape(groups, queries + 2, head_dim)
    return (rows[:, :queries], rows[:, queries], rows[:, queries + 1])[index].flatten()
