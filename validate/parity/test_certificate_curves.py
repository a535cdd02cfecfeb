"""L5's arithmetic on made data: intervals of gaps, the smallest K, gates of an interval, relative errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crt_export.parity.certificate.curves import perplexity_gap_interval, smallest_passes
from crt_export.parity.certificate.runs import Chain
from crt_export.parity.difference import relative_error
from crt_export.parity.metrics import Check, measured
from crt_export.parity.statistics import Interval


def _intervals(*means: float, half: float = 0.002) -> list[Interval]:
    return [Interval(mean=mean, low=mean - half, high=mean + half) for mean in means]


@pytest.mark.parametrize(
    ("gaps", "found"),
    [
        (_intervals(0.5, 0.1, 0.007, 0.001), 3),
        (_intervals(0.5, 0.1, 0.0085, 0.001), 4),  # the interval, not the mean, has to lie within
        (_intervals(0.001, 0.001, 0.5, 0.001), 4),  # a K that only happens to be near does not count
        (_intervals(0.5, 0.001, 0.001, 0.02), None),
        (_intervals(0.001, -0.001, 0.001, -0.007), 1),
        (_intervals(0.001, 0.001, math.nan, 0.001), 4),
        (_intervals(0.001, 0.001, 0.001, math.nan), None),
    ],
)
def test_the_smallest_k_holds_for_all_larger_ones_too(gaps: list[Interval], found: int | None) -> None:
    assert smallest_passes((1, 2, 3, 4), gaps, 0.01) == found


def test_passes_may_come_in_strides() -> None:
    assert smallest_passes((5, 10), _intervals(0.5, 0.001), 0.01) == 10


def test_the_perplexity_gap_is_that_of_the_means_and_its_interval_covers() -> None:
    random = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        sequential = random.normal(1.0, 0.3, (16, 1)) + random.normal(0, 0.5, (16, 32))
        parallel = sequential + random.normal(0.01, 0.02, (16, 32))
        interval = perplexity_gap_interval(parallel, sequential)
        assert interval.mean == pytest.approx(math.exp(parallel.mean()) - math.exp(sequential.mean()), rel=1e-6)
        # Of the population: E[x] = 1, and the gap of 0.01 nat is on top.
        found += interval.low <= math.exp(1.01) - math.exp(1.0) <= interval.high
    assert 180 <= found <= 200, "a 95 % interval covers the truth in about 190 of 200 draws"


def test_a_perplexity_beyond_numbers_has_no_gap() -> None:
    assert math.isnan(perplexity_gap_interval(np.full((4, 2), 800.0), np.full((4, 2), 1.0)).mean)


def _excess(found: Interval, limit: float | None) -> Check:
    return measured("gap_excess", "a", found.mean, interval=found.ends, limit=limit, precision="w8")


def test_an_interval_gate_needs_the_whole_interval() -> None:
    inside, outside = _intervals(0.001)[0], _intervals(0.009)[0]
    assert _excess(inside, 0.01).passed is True
    failed = _excess(outside, 0.01)
    assert failed.passed is False
    assert "expected within +-0.01 (w8.gap_delta_nll)" in failed.failures[0]
    assert _excess(outside, None).passed is None
    nothing = Interval(mean=math.nan, low=math.nan, high=math.nan)
    assert _excess(nothing, 1).passed is False


def test_relative_errors_see_nan_and_shapes() -> None:
    one = np.ones((2, 3), np.float32)
    assert relative_error(one * 2, one) == 1
    assert math.isnan(relative_error(one * np.nan, one))
    assert relative_error(one[:1], one) == math.inf
    assert Chain(hidden=one).caches == {}
