"""Scores -> rows: the figures of one comparison, and the checks its verdict comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crt_export.parity.corpus_statistics import corpus_statistics
from crt_export.parity.gates import coverage_check, figure_checks, gap_check
from crt_export.parity.level import Check
from crt_export.parity.report import ParityRow
from crt_export.parity.scores import Scores
from crt_export.parity.statistics import Interval, paired_interval, perplexity, ratio_interval
from crt_export.parity.tolerances import Tolerances

GAP = "regime-gap"


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """One row and the checks it stands on.

    Attributes:
        label: What the checks are called after: ``prefill``, ``regime-gap 0-128``.
        row: Its failures are those of the checks, in their order.
        checks: Every gate and every figure that is only reported.
        figures: Those of :func:`crt_export.parity.corpus_statistics.corpus_statistics`; None where the regime did not
            run to its end, or the row is a regime gap.
    """

    label: str
    row: ParityRow
    checks: tuple[Check, ...] = ()
    figures: Mapping[str, Any] | None = None

    def judged(self, *checks: Check) -> Comparison:
        """With more checks: the row fails with their sentences, and passes if one was gated and none failed."""
        checks = (*self.checks, *checks)
        gates = [check.passed for check in checks if check.passed is not None]
        failures = tuple(failure for check in checks for failure in check.failures)
        row = dataclasses.replace(self.row, failures=failures, passed=all(gates) if gates else None)
        return dataclasses.replace(self, row=row, checks=checks)


def compare(
    row: ParityRow, scores: Scores, tolerances: Tolerances, problems: Sequence[str], *, label: str = ""
) -> Comparison:
    """Fill in the figures of a comparison and gate them.

    Args:
        row: Names, steps and arithmetic.
        scores: What was measured.
        tolerances: The limits; those of ``row.precision`` apply.
        problems: What already went wrong while it ran.
        label: What to call the checks after; empty is the regime.

    Returns:
        The row with figures, the steps that every window took, ``passed`` and one sentence per failure. Where tokens
        are missing or not finite the figures stay None: a mean over what is left would describe something else.
    """
    label, compared = label or row.regime, scores.compared
    tokens, expected = int(compared.sum()), compared.size
    problems = list(problems)
    if tokens == 0:
        problems.append("nothing was compared")
    elif tokens < expected:
        problems.append(f"{tokens} of {expected} tokens were compared")
    finite = bool(np.isfinite(scores.nll).all() and np.isfinite(scores.largest_error).all())
    if tokens == expected and not finite and not problems:
        problems.append("logits are NaN or infinite")
    row = dataclasses.replace(
        row,
        tokens=tokens,
        steps=row.steps if tokens == expected else int(compared.sum(axis=1).min()),
        near_tie_margin=tolerances.near_tie_margin,
        positions=(scores.start, scores.start + compared.shape[1]),
    )
    coverage = coverage_check(label, tokens, expected, problems)
    if tokens < expected or not finite:
        return Comparison(label=label, row=row).judged(coverage)
    row, figures = _with_figures(row, scores, tolerances.near_tie_margin), corpus_statistics(scores)
    gates = figure_checks(label, row, figures, tolerances.precisions[row.precision], vocab=scores.vocab)
    return Comparison(label=label, row=row, figures=figures).judged(coverage, *gates)


def gap_row(row: ParityRow, sequential: np.ndarray, parallel: np.ndarray, span: slice) -> tuple[ParityRow, np.ndarray]:
    """How far K passes are from the recurrence of the same target, on some positions of the windows.

    Args:
        row: Names.
        sequential: Negative log-likelihoods of the step chain, nats [windows, positions].
        parallel: Those of the K passes.
        span: Positions.

    Returns:
        The row, not gated, and the paired differences [windows, positions].
    """
    parallel, sequential = parallel[:, span], sequential[:, span]
    gap = parallel - sequential
    interval = paired_interval(gap)
    row = dataclasses.replace(
        row,
        regime=GAP,
        tokens=gap.size,
        positions=(span.start, span.stop),
        **_likelihoods(parallel, sequential, interval),
    )
    return row, gap


def gate_gap(row: ParityRow, gap: np.ndarray, reference_gap: np.ndarray, limit: float | None) -> Comparison:
    """Judge a target's regime gap against FP32's own, paired; None as limit only reports."""
    excess = paired_interval(gap - reference_gap)
    row = dataclasses.replace(row, excess_gap=excess.mean, excess_gap_ci=(excess.low, excess.high))
    label = f"{GAP} {row.positions[0]}-{row.positions[1]}" if row.positions else GAP
    return Comparison(label=label, row=row).judged(gap_check(label, row.precision, excess, limit))


def _with_figures(row: ParityRow, scores: Scores, margin: float) -> ParityRow:
    interval = paired_interval(scores.nll - scores.reference_nll)
    relative = ratio_interval(scores.mean_error, np.maximum(scores.spread, np.finfo(np.float32).tiny))
    return dataclasses.replace(
        row,
        **_likelihoods(scores.nll, scores.reference_nll, interval),
        **_top1(scores, margin),
        max_abs_logit_error=float(scores.largest_error.max()),
        mean_abs_logit_error=float(scores.mean_error.mean()),
        relative_logit_error=relative.mean,
        relative_logit_error_ci=(relative.low, relative.high),
        mean_kl=float(scores.kl.mean()),
        better_than_chance=scores.better_than_chance,
    )


def _top1(scores: Scores, margin: float) -> dict:
    counted = (scores.margin > margin).astype(np.float64)
    if not counted.any():
        return {"top1_tokens": 0}
    share = ratio_interval(scores.agrees * counted, counted)
    return {"top1_tokens": int(counted.sum()), "top1_agreement": share.mean, "top1_ci": (share.low, share.high)}


def _likelihoods(found: np.ndarray, expected: np.ndarray, interval: Interval) -> dict:
    nll, reference = float(found.mean()), float(expected.mean())
    return {
        "nll": nll,
        "reference_nll": reference,
        "delta_nll": interval.mean,
        "delta_nll_ci": (interval.low, interval.high),
        "perplexity": perplexity(nll),
        "reference_perplexity": perplexity(reference),
    }
