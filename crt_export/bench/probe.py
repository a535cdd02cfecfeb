"""Rates of this machine right now: how fast it reads memory and multiplies matrices.

A shared machine's bandwidth changes from second to second (17 to 36 GB/s were seen on one), so both rates are sampled
in turns with the measurement that is judged by them. Reading is one ``numpy.bitwise_or.reduce`` per thread over its
share of an array far beyond the caches: it loads every byte once, stores nothing, and releases Python's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_GEMM = 512  # three matrices of 1 MiB a thread, which stay in its caches
_GEMM_REPEATS = 4


class Probe:
    """Reads and multiplies in as many threads as a candidate uses.

    BLAS must have been told to use one thread (``OPENBLAS_NUM_THREADS=1``) before numpy was imported.
    """

    def __init__(self, threads: int, size: int) -> None:
        """Allocate ``size`` bytes and touch every page."""
        self._pool = ThreadPoolExecutor(max(1, threads - 1))
        words = np.ones(max(threads, size // 8), np.uint64)
        self._bytes = words.nbytes
        self._shares = np.array_split(words, threads)
        generator = np.random.default_rng(0)
        self._matrices = [generator.standard_normal((3, _GEMM, _GEMM)).astype(np.float32) for _ in range(threads)]

    def read_gb_s(self, samples: int) -> list[float]:
        """Read everything once to warm up, then ``samples`` times; the rates in 1e9 bytes per second."""
        seconds = [self._seconds(np.bitwise_or.reduce, self._shares) for _ in range(samples + 1)]
        return [self._bytes / 1e9 / taken for taken in seconds[1:]]

    def gflop_s(self, samples: int) -> list[float]:
        """Multiply once to warm up, then ``samples`` times; the rates in 1e9 float32 operations per second."""
        work = 2 * _GEMM**3 * _GEMM_REPEATS * len(self._matrices) / 1e9
        return [work / self._seconds(_multiply, self._matrices) for _ in range(samples + 1)][1:]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _seconds(self, work: Callable[[Any], object], parts: Sequence[Any]) -> float:
        """How long every part takes side by side, the first of them in this thread."""
        begin = time.perf_counter()
        others = [self._pool.submit(work, part) for part in parts[1:]]
        work(parts[0])
        for other in others:
            other.result()
        return time.perf_counter() - begin


def _multiply(matrices: np.ndarray) -> None:
    for _ in range(_GEMM_REPEATS):
        np.matmul(matrices[0], matrices[1], out=matrices[2])
