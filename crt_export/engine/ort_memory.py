"""Tensors of an ONNX Runtime session: numpy memory on a CPU, device memory on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from crt_export.engine.base import Buffer


class HostBuffer:
    """A numpy array that ONNX Runtime reads and writes directly."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        """Allocate zeros."""
        self._array = np.zeros(shape, np.dtype(dtype))
        self.shape = shape
        self.dtype = self._array.dtype
        self.address = self._array.ctypes.data

    def read(self) -> np.ndarray:
        """The array itself, not a copy."""
        return self._array

    def write(self, values: np.ndarray) -> None:
        """Replace the whole content."""
        self._array[...] = values

    def copy_rows(self, source: Buffer, rows: slice) -> None:
        """Take these rows from another buffer."""
        self._array[rows] = source.read()[rows]

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the cache entries of some tokens of one row."""
        self._array[row, :, begin:end] = 0


class DeviceBuffer:
    """Memory of a device (``cuda``; ``cpu`` works too), owned by an OrtValue.

    ONNX Runtime copies whole values only, so changing part of one goes through the host: that happens after a
    padded prefill, a failure or a reset, never in a step over all rows.
    """

    def __init__(self, library: Any, device: str, shape: tuple[int, ...], dtype: str) -> None:
        """Allocate zeros."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._value = library.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype), device, 0)
        self.address = int(self._value.data_ptr())

    def read(self) -> np.ndarray:
        """A host copy."""
        return self._value.numpy()

    def write(self, values: np.ndarray) -> None:
        """Replace the whole content, at the same address."""
        self._value.update_inplace(np.ascontiguousarray(values, self.dtype))

    def copy_rows(self, source: Buffer, rows: slice) -> None:
        """Take these rows from another buffer."""
        values = self.read()
        values[rows] = source.read()[rows]
        self.write(values)

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the cache entries of some tokens of one row."""
        values = self.read()
        values[row, :, begin:end] = 0
        self.write(values)
