"""Scores -> rows: the figures of one comparison and the gates they have to pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from crt_export.parity.report import ParityRow
from crt_export.parity.scores import Scores
from crt_export.parity.statistics import Interval, paired_interval, ratio_interval
from crt_export.parity.tolerances import Tolerance, Tolerances

GAP = "regime-gap"


def row_from_scores(row: ParityRow, scores: Scores, tolerances: Tolerances, problems: Sequence[str]) -> ParityRow:
    """Fill in the figures of a comparison and gate them.

    Args:
        row: Names, steps and arithmetic.
        scores: What was measured.
        tolerances: The limits; those of ``row.precision`` apply.
        problems: What already went wrong while it ran.

    Returns:
        The row with figures, the steps that every window took, ``passed`` and one sentence per failure. Where tokens
        are missing or not finite the figures stay None: a mean over what is left would describe something else.
    """
    compared = scores.compared
    tokens, expected = int(compared.sum()), compared.size
    failures = list(problems)
    if tokens == 0:
        failures.append("nothing was compared")
    elif tokens < expected:
        failures.append(f"{tokens} of {expected} tokens were compared")
    row = dataclasses.replace(
        row,
        tokens=tokens,
        steps=row.steps if tokens == expected else int(compared.sum(axis=1).min()),
        near_tie_margin=tolerances.near_tie_margin,
        positions=(scores.start, scores.start + compared.shape[1]),
    )
    if tokens == expected and np.isfinite(scores.nll).all() and np.isfinite(scores.largest_error).all():
        row, interval = _with_figures(row, scores, tolerances.near_tie_margin)
        failures += _gate_failures(row, interval, tolerances.precisions[row.precision])
    elif tokens == expected and not failures:
        failures.append("logits are NaN or infinite")
    return dataclasses.replace(row, failures=tuple(failures), passed=not failures)


def gap_row(row: ParityRow, step: Scores, prefill: Scores, span: slice) -> tuple[ParityRow, np.ndarray]:
    """How far K passes are from the recurrence of the same target, on some positions of the windows.

    Args:
        row: Names.
        step: Scores of the step chain.
        prefill: Scores of the K passes.
        span: Positions.

    Returns:
        The row, not gated, and the paired differences [windows, positions].
    """
    parallel, sequential = prefill.nll[:, span], step.nll[:, span]
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


def gate_gap(row: ParityRow, gap: np.ndarray, reference_gap: np.ndarray, limit: float | None) -> ParityRow:
    """Judge a target's regime gap against FP32's own, paired; None as limit only reports."""
    excess = paired_interval(gap - reference_gap)
    row = dataclasses.replace(row, excess_gap=excess.mean, excess_gap_ci=(excess.low, excess.high))
    if limit is None:
        return row
    failures = []
    if not excess.within(limit):
        failures.append(
            f"K passes and steps are further apart than in FP32: 95 % interval of the excess "
            f"[{excess.low:.3g}, {excess.high:.3g}] nat is not within +-{limit:g}"
        )
    return dataclasses.replace(row, passed=not failures, failures=tuple(failures))


def _with_figures(row: ParityRow, scores: Scores, margin: float) -> tuple[ParityRow, Interval]:
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
    ), interval


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
        "perplexity": _perplexity(nll),
        "reference_perplexity": _perplexity(reference),
    }


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # float64 ends near exp(709)


def _gate_failures(row: ParityRow, interval: Interval, limits: Tolerance) -> list[str]:
    failures = []
    if row.better_than_chance and not interval.within(limits.delta_nll):
        failures.append(
            f"95 % interval of delta NLL [{interval.low:.3g}, {interval.high:.3g}] nat is not within "
            f"+-{limits.delta_nll:g}"
        )
    if row.top1_agreement is None:
        failures.append(f"top-1 was not compared: no token has a margin above {row.near_tie_margin:g} in the reference")
    elif row.top1_agreement < limits.top1_agreement:
        failures.append(
            f"top-1 agreement {row.top1_agreement:.2%} of {row.top1_tokens} tokens is below {limits.top1_agreement:.2%}"
        )
    relative = row.relative_logit_error
    if relative is not None and not relative <= limits.relative_logit_error:
        failures.append(
            f"mean |logit error| is {relative:.3g} of the logits' standard deviation, above "
            f"{limits.relative_logit_error:g}"
        )
    error = row.max_abs_logit_error
    if limits.max_abs_logit_error is not None and error is not None and not error <= limits.max_abs_logit_error:
        failures.append(f"largest |logit error| {error:.3g} is above {limits.max_abs_logit_error:g}")
    return failures
