"""The protocol of an engine: what a runtime must offer so that a session can run on it.

A session allocates its tensors once (:class:`Buffer`), names the rows of them that a call works on
(:class:`BufferSlice`), binds those to a graph (:class:`Program`) and runs the result (:class:`Launch`) as often as
it likes. A key or value cache is bound as input and output at the same address, so the runtime updates it in
place; the recurrent state never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from crt_export.spec import TensorSpec


class Buffer(Protocol):
    """Memory of one tensor [rows, ...] where the runtime computes; each row is contiguous."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, rows first."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        ...

    @property
    def address(self) -> int:
        """Address of the first element, constant for the buffer's life."""
        ...

    def read(self) -> np.ndarray:
        """The content on the host; may be the memory itself, so copy what must last."""
        ...

    def write(self, values: np.ndarray) -> None:
        """Replace the whole content."""
        ...

    def copy_rows(self, source: Buffer, rows: slice) -> None:
        """Take these rows from a buffer of the same shape and dtype."""
        ...

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero ``[row, :, begin:end]``: cache entries of tokens ``begin`` to ``end`` of one row."""
        ...


@dataclass(frozen=True, slots=True)
class BufferSlice:
    """Rows ``start`` to ``stop`` of a buffer, bound as one tensor."""

    buffer: Buffer
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the bound tensor."""
        return (self.stop - self.start, *self.buffer.shape[1:])

    @property
    def address(self) -> int:
        """Address of the first bound element."""
        row_elements = int(np.prod(self.buffer.shape[1:], dtype=np.int64))
        return self.buffer.address + self.start * row_elements * self.buffer.dtype.itemsize


class Launch(Protocol):
    """A graph bound to its tensors."""

    def __call__(self) -> None:
        """Run once and wait for the result.

        Raises:
            ContractError: The runtime refused or failed.
        """
        ...


class Program(Protocol):
    """A graph that a runtime has loaded."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it reads."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it writes."""
        ...

    def bind(
        self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
    ) -> Launch:
        """Fix the memory of every input and output; the buffers must outlive the launch.

        Args:
            inputs: Input name to the rows it reads.
            outputs: Output name to the rows it writes.
            repeated: The launch runs many times over, as a step does, so work that makes every further run
                cheaper (a CUDA graph) pays.
        """
        ...


class Engine(Protocol):
    """The graphs of one target, loaded once and shared by the sessions that run them."""

    @property
    def max_tokens(self) -> int:
        """Longest chunk of one prefill call."""
        ...

    @property
    def max_batch(self) -> int | None:
        """Most rows of one call; None where any number runs."""
        ...

    @property
    def fixed_capacity(self) -> int | None:
        """The only cache capacity it runs with; None where any capacity runs."""
        ...

    @property
    def host_memory(self) -> bool:
        """Whether it computes in host memory, so that reading a buffer costs nothing."""
        ...

    @property
    def one_graph(self) -> bool:
        """Whether one graph of a single pass serves everything.

        ``step`` then is that graph too, bound to chunks of one token, and a recurrent model has ``prefill_pass`` and no
        unrolled ``prefill``; a plain transformer has ``prefill``, which is one pass anyway.
        """
        ...

    def program(self, graph: str) -> Program:
        """The loaded graph of this name (``step``, ``prefill``, ``prefill_pass``).

        ``step`` and ``prefill`` are loaded with the engine; ``prefill_pass``, which most applications never
        run, on first use, unless ``one_graph``. May be called from several threads at once.

        Raises:
            UnsupportedError: The target has no such graph.
            BundleError: A file that is loaded on first use is missing or differs from what was built.
            ContractError: It cannot be loaded or breaks the contract.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New zeroed memory where this engine computes."""
        ...

    def close(self) -> None:
        """Release the graphs; their launches may no longer run."""
        ...
