"""Intervals, limits and gates, on numbers worked out elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.catalog import definition_path
from crt_export.errors import InputError
from crt_export.parity import Comparison, ParityReport, load_tolerances
from crt_export.parity.comparison import compare, judge_gap
from crt_export.parity.metrics import AT_LEAST, METRICS, SHARED_LIMITS, Check, measured
from crt_export.parity.report import FORMAT, FORMAT_VERSION, corpus_result
from crt_export.parity.scores import Scores
from crt_export.parity.statistics import Interval, paired_interval, ratio_interval, student_t_quantile

# Two-sided 95 % quantiles as printed in any table of Student's t distribution.
TABLE = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 15: 2.1314, 30: 2.0423, 120: 1.9799, 100_000: 1.9600}


@pytest.mark.parametrize("freedom", TABLE)
def test_student_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert student_t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=6e-5)


def test_interval_of_known_window_means() -> None:
    # Window means 1, 2, 3: mean 2, standard deviation 1, half-width t(2) / sqrt(3).
    interval = paired_interval(np.array([[0.0, 2.0], [2.0, 2.0], [2.0, 4.0]]))
    half = 4.3027 / math.sqrt(3)
    assert interval.mean == 2
    assert (interval.low, interval.high) == pytest.approx((2 - half, 2 + half), abs=1e-4)


def test_tokens_of_one_window_are_not_counted_as_independent() -> None:
    windows = np.repeat([[0.0], [1.0], [0.5]], 1000, axis=1)
    assert paired_interval(windows).high - paired_interval(windows).low > 1


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    intervals = [paired_interval(generator.normal(0.3, 1, (8, 5))) for _ in range(400)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.92 < covered < 0.98


def test_nan_is_within_no_limit() -> None:
    interval = paired_interval(np.array([[0.0], [np.nan], [0.0]]))
    assert math.isnan(interval.low)
    assert not interval.within(1e9)


def test_ratio_interval_of_known_sums() -> None:
    # 1 + 3 of 2 + 2: ratio 1, deviations -1 and +1 in units of the mean whole 2, half-width t(1) / 2.
    interval = ratio_interval(np.array([[1.0], [3.0]]), np.array([[2.0], [2.0]]))
    assert interval.mean == 1
    assert (interval.low, interval.high) == pytest.approx((1 - 12.7062 / 2, 1 + 12.7062 / 2), abs=1e-4)


def test_ratio_interval_covers_a_share_as_often_as_it_says() -> None:
    generator = np.random.default_rng(8)
    covered = 0
    for _ in range(400):
        counted = (generator.random((16, 40)) < 0.8).astype(float)
        agrees = (generator.random((16, 40)) < 0.9).astype(float)
        interval = ratio_interval(agrees * counted, counted)
        assert interval.mean == pytest.approx((agrees * counted).sum() / counted.sum())
        covered += interval.low <= 0.9 <= interval.high
    assert 0.91 < covered / 400 < 0.98


def test_a_ratio_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="something to divide by"):
        ratio_interval(np.ones((2, 2)), np.zeros((2, 2)))


@pytest.mark.parametrize("shape", [(1, 10), (5, 0), (0, 0), (4,)])
def test_too_few_windows_give_no_interval(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two windows"):
        paired_interval(np.zeros(shape))


def test_equivalence_needs_the_whole_interval_inside() -> None:
    assert Interval(mean=0, low=-0.9, high=0.9).within(1)
    assert not Interval(mean=0, low=-0.9, high=1.1).within(1)
    assert not Interval(mean=0, low=-1.1, high=0.9).within(1)


def _scores(**changes: Any) -> Scores:
    full = {
        "nll": 2.0, "reference_nll": 2.0, "kl": 0.0, "largest_error": 0.0, "mean_error": 0.0, "spread": 1.0,
        "margin": 1.0, "agrees": 1.0, "overlap": 1.0,
    }  # fmt: skip
    arrays: dict[str, Any] = {name: np.full((4, 8), changes.pop(name, value)) for name, value in full.items()}
    return Scores(start=0, vocab=256, **arrays)


def _row(precision: str = "fp32") -> Comparison:
    return Comparison(
        target="t", runtime="onnxruntime", graph="step", precision=precision, regime="step", steps=8, arithmetic="fp32"
    )


def test_equal_scores_pass_with_every_figure() -> None:
    row = compare(_row(), _scores(), load_tolerances(), [])
    assert row.passed is True
    assert (row.tokens, row.value("delta_nll"), row.value("top1_agreement"), row.top1_tokens) == (32, 0, 1, 32)
    assert row.perplexity == pytest.approx(math.exp(2))
    assert (row.interval("top1_agreement"), row.interval("relative_logit_error")) == ((1, 1), (0, 0))


def test_point_gates_report_their_interval_over_windows() -> None:
    scores = _scores()
    scores.agrees[0, :4] = 0.0  # one window of four agrees in half of its tokens
    scores.mean_error[0] = 0.4
    row = compare(_row(), scores, load_tolerances(), [])
    half = 3.1824 * 0.25 / 2  # t(3) * standard deviation 0.25 of (0.5, 1, 1, 1) / sqrt(4)
    assert row.value("top1_agreement") == 0.875
    assert row.interval("top1_agreement") == pytest.approx((0.875 - half, 0.875 + half), abs=1e-4)
    assert row.value("relative_logit_error") == pytest.approx(0.1)
    assert row.interval("relative_logit_error") == pytest.approx((0.1 - 3.1824 * 0.1, 0.1 + 3.1824 * 0.1), abs=1e-4)


@pytest.mark.parametrize(
    ("precision", "change", "sentence"),
    [
        ("fp32", {"nll": 2.00002}, "95 % interval of delta NLL"),
        ("fp32", {"nll": 1.99998}, "95 % interval of delta NLL"),
        ("fp16", {"nll": 2.0011}, "95 % interval of delta NLL"),
        ("w8", {"nll": 2.0021}, "95 % interval of delta NLL"),
        ("w8a8", {"nll": 2.0051}, "95 % interval of delta NLL"),
        ("fp32", {"largest_error": 0.0011}, "largest |logit error|"),
        ("fp16", {"agrees": 0.0}, "top-1 agreement 0.00%"),
        ("fp16", {"margin": 0.001}, "top-1 was not compared"),
        ("fp16", {"kl": 0.001}, "mean KL divergence 0.001 nat is above 2e-05"),
        ("w8", {"overlap": 0.5}, "top-10 overlap 50.00% is below 94.00%"),
    ],
)
def test_each_gate_fails_with_its_own_sentence(precision: str, change: dict[str, float], sentence: str) -> None:
    row = compare(_row(precision), _scores(**change), load_tolerances(), [])
    assert row.passed is False
    assert len(row.failures) == 1
    assert sentence in row.failures[0]


def test_probabilities_that_change_both_ways_fail_where_the_mean_does_not_move() -> None:
    scores = _scores()
    scores.nll[:, ::2] += 0.4
    scores.nll[:, 1::2] -= 0.4
    found = compare(_row("w8a8"), scores, load_tolerances(), [])
    assert found.value("delta_nll") == pytest.approx(0)
    assert len(found.failures) == 1
    # exp(-2) (exp(+-0.4) - 1) is 0.0666 and -0.0446.
    assert found.failures[0].startswith("probability of the text's next token changes by 0.0567")


def test_checks_and_row_are_one_verdict() -> None:
    found = compare(_row(), _scores(nll=2.1, overlap=0.5), load_tolerances(), ["stopped early"], label="step (half)")
    failed = [check for check in found.checks if check.passed is False]
    assert [check.name for check in failed] == [
        "step (half): runs", "step (half): delta_nll", "step (half): top10_overlap", "step (half): probability_change",
    ]  # fmt: skip
    assert found.failures == tuple(failure for check in failed for failure in check.failures)
    assert found.passed is False


def test_all_tokens_there_are_overlap_whatever_a_target_says() -> None:
    scores = dataclasses.replace(_scores(), vocab=10)
    (check,) = (c for c in compare(_row(), scores, load_tolerances(), []).checks if c.name == "step: top10_overlap")
    assert (check.value, check.passed, check.limit) == (1, None, None)


def test_a_near_tie_does_not_count_for_top1() -> None:
    scores = _scores()
    scores.margin[0, 0], scores.agrees[0, 0] = 0.009, 0.0
    row = compare(_row(), scores, load_tolerances(), [])
    assert (row.passed, row.value("top1_agreement"), row.top1_tokens) == (True, 1.0, 31)


def test_missing_tokens_fail_and_leave_no_figures() -> None:
    scores = _scores()
    for name in ("nll", "reference_nll", "margin"):
        getattr(scores, name)[2, 5:] = np.nan
    row = compare(_row(), scores, load_tolerances(), [])
    assert row.failures == ("29 of 32 tokens were compared",)
    assert (row.passed, row.tokens, row.steps, row.nll) == (False, 29, 5, None)


def test_nothing_compared_fails() -> None:
    row = compare(_row(), _scores(nll=np.nan, margin=np.nan), load_tolerances(), [])
    assert (row.passed, row.failures, row.tokens, row.steps) == (False, ("nothing was compared",), 0, 0)


def test_a_nan_likelihood_fails_even_if_nobody_reported_it() -> None:
    row = compare(_row(), _scores(nll=np.nan), load_tolerances(), [])
    assert (row.passed, row.failures) == (False, ("logits are NaN or infinite",))


def test_regime_gap_is_judged_against_the_gap_of_fp32() -> None:
    own, excess = _row(), np.full((4, 8), 1e-3)
    same = judge_gap(own, 0 * excess, 1e-5)
    assert (same.passed, same.value("gap_delta_nll")) == (True, 0)
    wider = judge_gap(own, excess, 1e-5)
    assert wider.passed is False
    assert "further apart than in FP32" in wider.failures[0]
    assert judge_gap(own, excess, None).passed is None


def test_tolerances_are_those_the_project_promises() -> None:
    limits = load_tolerances()
    assert (limits.precisions["fp32"].max_abs_logit_error or 1) <= 1e-3
    promised = {"fp16": (0.001, 0.995), "w8": (0.002, 0.98), "w8a8": (0.005, 0.975)}
    for name, (delta_nll, top1) in promised.items():
        assert limits.precisions[name].delta_nll <= delta_nll
        assert limits.precisions[name].top1_agreement >= top1
    assert limits.fp16_headroom <= 65504 / 4
    assert all(len(reason) > 20 for reason in limits.reasons.values())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[fp16.delta_nll]", "[fp16.delta_nlll]", "unknown key 'delta_nlll'"),
        ("[fp16.delta_nll]", "[fp16.delta_nlll]", "[fp16] has no delta_nll"),
        ("limit = 0.998", "limit = 1.5", "a share and at most 1"),
        ("limit = 5e-4", "limit = -1", "greater than 0"),
        ("limit = 5e-4", 'limit = "small"', "greater than 0"),
        ("[shared.near_tie_margin]", "[common.near_tie_margin]", "unknown table [common]"),
        ("reason = ", 'reason = ""  # ', "reason must say why"),
        ("reason = ", "# ", "must be { limit = NUMBER, reason = TEXT }"),
        ("[fp16.delta_nll]", "[fp16.delta_nll", "expected a TOML file of tolerances"),
    ],
)
def test_a_bad_tolerance_file_is_refused(tmp_path: Path, old: str, new: str, problem: str) -> None:
    text = definition_path("validate", "tolerances.toml").read_text()
    assert old in text
    path = tmp_path / "tolerances.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_tolerances(path)
    assert problem in str(error.value)


def _report(*rows: Comparison) -> ParityReport:
    named = [
        dataclasses.replace(row, label=f"{row.label or row.regime} {n}", checks=_renamed(row, n))
        for n, row in enumerate(rows)
    ]
    levels = (corpus_result("t", named),) if rows else ()
    return ParityReport(levels=levels, tolerances=load_tolerances().to_dict(), text={"sha256": "0"}, notes=("short",))


def _renamed(row: Comparison, number: int) -> tuple[Check, ...]:
    return tuple(
        dataclasses.replace(check, name=check.name.replace(f"{row.label}:", f"{row.label} {number}:"))
        for check in row.checks
    )


def test_report_passes_only_if_something_was_gated_and_held() -> None:
    good = compare(_row(), _scores(), load_tolerances(), [])
    bad = compare(_row(), _scores(nll=3.0), load_tolerances(), [])
    compiled = Comparison(
        target="t", runtime="tensorrt-rtx", graph="step", precision="fp16", regime="step", status="compiled"
    )
    assert _report(good, compiled).passed
    assert not _report(good, bad).passed
    assert not _report(compiled).passed
    assert not _report().passed
    assert _report(good, bad).failures[0].startswith("t corpus (step 1: delta_nll): 95 % interval")


def test_report_survives_json_and_gives_its_comparisons_back() -> None:
    good = compare(_row(), _scores(), load_tolerances(), [])
    infinite = compare(_row(), _scores(largest_error=np.inf), load_tolerances(), ["overflow"])
    report = _report(good, infinite)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    again = ParityReport.from_dict(document)
    assert again.to_dict() == document
    assert [(row.passed, row.failures) for row in again.rows] == [(True, ()), (False, ("overflow",))]
    row = again.rows[0]
    assert (row.runtime, row.graph, row.regime, row.tokens, row.steps) == ("onnxruntime", "step", "step", 32, 8)
    assert (row.nll, row.perplexity, row.value("delta_nll"), row.value("mean_kl")) == (2, math.exp(2), 0, 0)
    assert row.interval("top1_agreement") == (1, 1)
    assert (again.rows[1].nll, again.rows[1].value("mean_kl")) == (None, None)


def test_a_foreign_report_is_refused() -> None:
    foreign = {"format": FORMAT, "format_version": FORMAT_VERSION}
    with pytest.raises(InputError, match="expected 'crt-export parity report' of version 1, found None"):
        ParityReport.from_dict({"levels": []})
    with pytest.raises(InputError, match="3 problems"):
        ParityReport.from_dict({**foreign, "levels": [], "verdict": "fine"})
    with pytest.raises(InputError, match="a level cannot be read"):
        ParityReport.from_dict({**foreign, "levels": [{"target": "t"}], "tolerances": {}, "text": {}})


def test_every_limit_of_the_table_of_metrics_is_a_tolerance() -> None:
    limits = load_tolerances()
    keys = {name for name, tolerance in limits.precisions.items() for name in vars(tolerance)} | set(SHARED_LIMITS)
    assert {metric.limit for metric in METRICS.values() if metric.limit} <= keys


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_fails_with_a_sentence_on_nan_and_beyond_its_limit(key: str) -> None:
    words = {"tokens": 32, "tensor": "next_state"}
    beyond = -1.0 if METRICS[key].relation == AT_LEAST else 2.0
    for value in (math.nan, beyond):
        check = measured(key, "name", value, interval=(value, value), limit=0.5, precision="w8", **words)
        assert check.passed is False
        assert len(check.failures) == 1
    assert measured(key, "name", 0.5, interval=(0.5, 0.5), limit=0.5, precision="w8", **words).passed is True
    assert measured(key, "name", beyond).passed is None


def test_likelihood_gates_only_models_that_predict_better_than_chance() -> None:
    """A random model is worse than a uniform guess: there an error of the logits shifts the mean to first order."""
    noise = np.random.default_rng(0).normal(0.01, 1e-4, (4, 8))
    fits, guesses = 5.0, 6.0  # a uniform guess over 256 tokens costs ln 256 = 5.545 nat
    row = compare(_row("w8"), _scores(nll=fits + noise, reference_nll=fits), load_tolerances(), ())
    assert row.better_than_chance
    assert "delta NLL" in row.failures[0]
    row = compare(_row("w8"), _scores(nll=guesses + noise, reference_nll=guesses, kl=9.0), load_tolerances(), ())
    assert not row.better_than_chance
    assert row.passed
    assert row.value("delta_nll") == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("reference_nll", [2.0, 9.0])
def test_relative_logit_error_gates_every_model(reference_nll: float) -> None:
    scores = _scores(nll=reference_nll, reference_nll=reference_nll, mean_error=0.1, spread=2.0)
    row = compare(_row("w8a8"), scores, load_tolerances(), ())
    assert row.value("relative_logit_error") == pytest.approx(0.05)
    assert row.passed is False
    assert "standard deviation" in row.failures[0]
