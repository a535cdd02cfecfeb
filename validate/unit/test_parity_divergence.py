"""Divergence, overlap and bootstrap intervals, on numbers worked out by hand or elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from crt_export.parity.comparison import KL_EDGES, kl_histogram
from crt_export.parity.scores import Scores, divergence, token_scores
from crt_export.parity.statistics import MOST_BLOCKS, bootstrap_interval, bootstrap_mean, ratio, window_sums


# --- bootstrap
def test_bootstrap_of_a_skewed_sample_is_that_of_scipy() -> None:
    # scipy 1.17.1: bootstrap((sample,), np.mean, n_resamples=200_000, method="BCa") gives [4.7, 16.4]; plain
    # percentiles would be [4.0, 14.7].
    sample = np.array([1, 2, 2, 3, 4, 6, 9, 15, 16, 30.0])
    interval = bootstrap_mean(sample[:, None])
    assert interval.mean == pytest.approx(8.8)
    assert (interval.low, interval.high) == pytest.approx((4.7, 16.4), abs=0.25)
    assert bootstrap_mean(sample[:, None]) == interval


def test_bootstrap_of_two_windows_reaches_from_one_to_the_other() -> None:
    interval = bootstrap_mean(np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert (interval.mean, interval.low, interval.high) == (2, 1, 3)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(9)
    samples = generator.exponential(1.0, (300, 24, 1))
    covered = np.mean([interval.low <= 1 <= interval.high for interval in map(bootstrap_mean, samples)])
    assert 0.88 < covered < 0.98


def test_bootstrap_is_paired_and_follows_monotone_functions() -> None:
    values = np.random.default_rng(3).normal(2, 1, (16, 4))
    plain = bootstrap_mean(values)
    shifted = bootstrap_mean(values + 1)
    assert (shifted.low - plain.low, shifted.high - plain.high) == pytest.approx((1, 1))
    grown = bootstrap_interval(window_sums(values, np.ones_like(values)), lambda sums: np.exp(ratio(sums)))
    assert (grown.low, grown.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)), rel=1e-2)


def test_bootstrap_of_very_many_windows_draws_blocks() -> None:
    values = np.repeat(np.random.default_rng(4).normal(0, 1, MOST_BLOCKS), 8)[:, None]
    interval = bootstrap_mean(values)
    # Eight equal neighbours are one observation: the interval is as wide as that of the blocks.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(MOST_BLOCKS), rel=0.1)


def test_bootstrap_without_spread_has_no_width_and_of_nan_no_ends() -> None:
    assert bootstrap_mean(np.full((4, 2), 0.1)).low == bootstrap_mean(np.full((4, 2), 0.1)).high
    assert math.isnan(bootstrap_mean(np.array([[1.0], [np.nan]])).low)
    with pytest.raises(ValueError, match="at least two windows"):
        bootstrap_mean(np.ones((1, 3)))


def test_bootstrap_of_a_figure_that_no_draw_changes_has_no_width() -> None:
    sums = np.array([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    interval = bootstrap_interval(sums, lambda drawn: drawn[..., 0] - drawn[..., 1])
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


# --- scores
def _divergence(expected: list[float], found: list[float]) -> float:
    first, second = (torch.tensor([logits], dtype=torch.float64) for logits in (expected, found))
    return float(divergence(first.log_softmax(-1), second.log_softmax(-1), second - first))


def test_divergence_of_two_distributions_worked_out_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln (2/3) = ln(4/3) / 2.
    assert _divergence([0, 0], [0, math.log(3)]) == pytest.approx(math.log(4 / 3) / 2, rel=1e-14)
    # Logits 100 apart: ln q = (-100, 0) to rounding.
    assert _divergence([0, 0], [0, 100]) == pytest.approx(50 - math.log(2), rel=1e-14)
    assert _divergence([0, 0], [0, 2000]) == pytest.approx(1000 - math.log(2), rel=1e-14)
    # Adding a constant to all logits changes nothing.
    assert _divergence([1, 2, 3], [6, 7, 8]) == pytest.approx(0, abs=1e-30)


def test_divergence_keeps_its_digits_where_the_textbook_sum_loses_them() -> None:
    # p (1 - p) d^2 / 2 to first order, with p = 1/2.
    assert _divergence([0, 0], [0, 1e-7]) == pytest.approx(1e-14 / 8, rel=1e-6)
    assert _divergence([0, 0], [1e-9, 0]) == pytest.approx(1e-18 / 8, rel=1e-6)


def test_scores_of_one_token_worked_out_by_hand() -> None:
    expected = torch.tensor([[[math.log(1 / 2), math.log(1 / 4), math.log(1 / 4)]]])
    found = torch.tensor([[[math.log(1 / 4), math.log(1 / 2), math.log(1 / 4)]]])
    scores = token_scores(found, expected, torch.tensor([[[0]]]), 0.0)
    assert float(scores["nll"]) == pytest.approx(math.log(4))
    assert float(scores["reference_nll"]) == pytest.approx(math.log(2))
    assert float(scores["kl"]) == pytest.approx(math.log(2) / 4)  # 1/2 ln 2 - 1/4 ln 2
    assert float(scores["largest_error"]) == pytest.approx(math.log(2))
    assert float(scores["mean_error"]) == pytest.approx(math.log(2) * 2 / 3)
    assert (float(scores["agrees"]), float(scores["overlap"])) == (0, 1)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in scores.items()}
    assert Scores(start=0, vocab=3, **arrays).probability_change.item() == pytest.approx(-1 / 4)


def test_overlap_counts_the_ten_best_and_near_ties_with_the_tenth() -> None:
    expected = torch.arange(20.0).reshape(1, 1, 20)  # 10 to 19 are the best
    found = expected.clone()
    found[..., [9, 8, 0]] = 30.0  # three others come among them, in place of 10, 11 and 12
    overlaps = [
        float(token_scores(found, expected, torch.tensor([[[0]]]), margin)["overlap"]) for margin in (0.0, 1.0, 2.0)
    ]
    assert overlaps == pytest.approx([0.7, 0.8, 0.9])


def test_every_divergence_has_a_bin() -> None:
    counts = kl_histogram(np.array([0.0, 1e-30, 1e-3, 2e-3, 1e9]))["counts"]
    assert (counts[0], counts[-1], sum(counts)) == (2, 1, 5)
    assert counts[KL_EDGES.index(-3.0)] == 2
