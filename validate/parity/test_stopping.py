"""The bound on the residual: the largest up to which stopping early costs no perplexity, by windows."""

from __future__ import annotations

import numpy as np
import pytest

from crt_export.parity.certificate.curves import Stopping, stopping_bound

PASSES = (1, 2, 3, 4)
WINDOWS = 8


def figures(gaps: tuple[float, ...], spread: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals that halve from window to window's own start, likelihoods off by ``gaps``, and the recurrence's."""
    noise = np.random.default_rng(0)
    starts = 1 + spread * noise.random(WINDOWS)
    residual = np.stack([starts / 2**index for index in range(len(PASSES))])
    sequential = 2 + 0.1 * noise.random((WINDOWS, 16))
    nll = np.stack([sequential + gap for gap in gaps])
    return residual, nll, sequential


def found(gaps: tuple[float, ...], limit: float = 0.01) -> Stopping | None:
    residual, nll, sequential = figures(gaps)
    return stopping_bound(PASSES, residual, nll, sequential, limit)


def test_it_is_the_largest_residual_of_the_first_number_of_passes_that_holds() -> None:
    residual, _, _ = figures((0.5, 0.1, 0.0, 0.0))
    stopping = found((0.5, 0.1, 0.0, 0.0))
    assert stopping is not None
    assert stopping.bound == residual[2].max()
    assert (stopping.passes, stopping.most_passes, stopping.unreached) == (3.0, 3, 0.0)
    assert abs(stopping.gap.mean) < 1e-12


def test_a_gap_that_is_small_again_beyond_larger_ones_is_luck() -> None:
    stopping = found((0.0, 0.5, 0.0, 0.0))
    assert stopping is not None
    assert stopping.most_passes == 3


def test_none_where_even_the_last_pass_is_off() -> None:
    assert found((0.5, 0.5, 0.5, 0.5)) is None


def test_windows_that_never_get_there_count_as_exact_and_as_unreached() -> None:
    residual, nll, sequential = figures((0.5, 0.5, 0.5, 0.0))
    nll[3, 1:] = sequential[1:] + 0.5  # only window 0 is right after its last pass
    residual[3, 0] = residual[3].min() / 2
    stopping = stopping_bound(PASSES, residual, nll, sequential, 0.01)
    assert stopping is not None
    assert stopping.bound == residual[3, 0]
    assert stopping.unreached == pytest.approx(1 - 1 / WINDOWS)


def test_a_gap_counts_on_both_sides() -> None:
    stopping = found((-0.5, -0.5, 0.0, 0.0))
    assert stopping is not None
    assert stopping.most_passes == 3
