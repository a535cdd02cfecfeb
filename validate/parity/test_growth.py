"""Growth on made data: the slope of a line, and an interval that covers it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crt_export.parity.long_run.figures import SMALLEST_UNITS, growth_from_units


def test_growth_is_the_slope_of_a_line() -> None:
    growth = growth_from_units(0.01 + 3e-4 * np.arange(40) * 0.25, 250)
    assert growth is not None
    assert growth.slope == pytest.approx(3e-4)
    assert growth.high - growth.low < 1e-12
    assert growth_from_units(np.ones(SMALLEST_UNITS - 1), 250) is None
    late = growth_from_units(np.append(np.ones(20), np.nan), 250)
    assert late is not None
    assert math.isnan(late.high)


def test_the_interval_covers_the_slope_where_neighbours_are_alike() -> None:
    """400 made runs whose noise carries half of itself on: 95 % within three points, far less without adjustment."""
    generator = np.random.default_rng(5)
    covered, plain = [], []
    for _ in range(400):
        noise = generator.standard_normal(160)
        for i in range(1, 160):
            noise[i] += 0.5 * noise[i - 1]
        growth = growth_from_units(noise + 0.7 * np.arange(160) * 0.128, 128)
        assert growth is not None
        covered.append(growth.low <= 0.7 <= growth.high)
        shrink = math.sqrt((1 - growth.autocorrelation) / (1 + growth.autocorrelation))
        plain.append(abs(growth.slope - 0.7) <= (growth.high - growth.slope) * shrink)
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.mean(plain) < 0.80
