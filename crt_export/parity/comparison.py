"""Comparison of one regime with PyTorch FP32: scores become figures, figures become checks.

Metrics in nats (``Metric.nats``) gate only where the reference predicts the text better than a uniform guess would:
they are costs that grow with the scale of the logits, and the logits of a model that does not fit the text have no
scale of their own. Elsewhere they are reported. The others are shares, or relative to the spread of the logits, and
judge every model.

The regime gap is how far K parallel passes are from the exact recurrence, in PyTorch FP32 and in every target. The gap
of the reference belongs to the model and gates nothing. A target is judged by how much larger its own gap is, on
positions below the length the model was trained at; above that it is reported.

What is judged is a figure (:func:`corpus_figures`), what describes it a statistic (:func:`corpus_statistics`): what
``llama-perplexity --kl-divergence`` prints, and more. The keys of the latter, intervals being 95 % bootstrap intervals
[low, high] over windows (:mod:`crt_export.parity.statistics`), divergences in nats, probabilities as shares of 1:

* ``perplexity_ci``: of the target. ``perplexity_ratio`` (over the reference's; exp of ``delta_nll``),
  ``perplexity_difference``, each with ``_ci``. ``delta_nll_bootstrap_ci``.
* ``log_perplexity_correlation``: of the two negative log-likelihoods, token by token; None where one never varies.
* ``kl``: ``median``, ``min``, ``max`` and percentiles ``p001`` (0.1 %), ``p1``, ``p5``, ``p10``, ``p90``, ``p95``,
  ``p99``, ``p999`` (99.9 %).
* ``kl_histogram``: ``edges``, log10 of nats, the same in every report, and ``counts`` of tokens between them; what lies
  outside, a divergence of 0 too, is in the first or the last bin.
* ``probability_change``: of the text's next token, signed: ``mean``, ``mean_ci`` and what ``kl`` has, ``p25`` and
  ``p75`` too.
* ``top1_all``, ``top1_all_ci``: share of all tokens with the same best token, near ties included (the gate leaves those
  out).
* ``by_position``: per range of positions in the window (powers of two, and the length the model was trained at)
  ``start``, ``stop``, ``delta_nll``, ``delta_nll_ci``, ``kl``, ``kl_ci``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crt_export.parity.metrics import METRICS, measured
from crt_export.parity.reference import PREFILL, STEP, Reference
from crt_export.parity.report import GAP, Comparison
from crt_export.parity.scores import TOP, Scores, reference_nll
from crt_export.parity.setup import ParityCase
from crt_export.parity.statistics import (
    Interval,
    bootstrap_interval,
    bootstrap_mean,
    paired_interval,
    ratio,
    ratio_interval,
    window_sums,
)
from crt_export.parity.tolerances import Tolerances

#: log10 of nats; fixed, so that two reports can be compared bin by bin.
KL_EDGES = tuple(edge / 2 for edge in range(-40, 5))
_PERCENTILES = {
    "median": 50, "p001": 0.1, "p1": 1, "p5": 5, "p10": 10, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9,
}  # fmt: skip


def compare(
    row: Comparison, scores: Scores, tolerances: Tolerances, problems: Sequence[str], *, label: str = ""
) -> Comparison:
    """Fill in the figures of a comparison and gate them.

    Args:
        row: Names, steps and arithmetic.
        scores: What was measured.
        tolerances: The limits; those of ``row.precision`` apply.
        problems: What already went wrong while it ran.
        label: What to call the checks after; empty is the regime.

    Returns:
        The comparison with figures, the steps that every window took, and one failed check per fault. Where tokens are
        missing or not finite there are no figures: a mean over what is left would describe something else.
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
        label=label,
        tokens=tokens,
        steps=row.steps if tokens == expected else int(compared.sum(axis=1).min()),
        positions=(scores.start, scores.start + compared.shape[1]),
    ).judged(measured("tokens", f"{label}: runs", float(tokens), limit=float(expected), failures=problems))
    if tokens < expected or not finite:
        return row
    row = dataclasses.replace(
        row,
        nll=float(scores.nll.mean()),
        reference_nll=float(scores.reference_nll.mean()),
        mean_abs_logit_error=float(scores.mean_error.mean()),
        top1_tokens=int((scores.margin > tolerances.near_tie_margin).sum()),
        better_than_chance=scores.better_than_chance,
        statistics=corpus_statistics(scores),
    )
    return _judged(row, scores, tolerances)


def _judged(row: Comparison, scores: Scores, tolerances: Tolerances) -> Comparison:
    limits, margin = tolerances.precisions[row.precision], tolerances.near_tie_margin
    for key, figure in corpus_figures(scores, margin).items():
        metric, interval = METRICS[key], None
        reported = metric.nats and not scores.better_than_chance
        if key == "top10_overlap" and scores.vocab <= TOP:
            reported = True  # all tokens there are: the overlap is 1 whatever the target says
        limit, failures = None if reported else getattr(limits, metric.limit), None
        if figure is None:
            failures = [f"top-1 was not compared: no token has a margin above {margin:g} in the reference"]
        elif isinstance(figure, Interval):
            figure, interval = figure.mean, figure.ends
        check = measured(
            key,
            f"{row.label}: {key}",
            figure,
            interval=interval,
            limit=limit,
            precision="" if limit is None else row.precision,
            failures=failures,
            tokens=row.top1_tokens,
        )
        row = row.judged(check)
    return row


# --- figures and statistics
def corpus_figures(scores: Scores, near_tie_margin: float) -> dict[str, Interval | float | None]:
    """Every figure that is judged, by metric: with its interval where it has one; None where nothing counts.

    Args:
        scores: What was measured; all tokens must have been compared and be finite.
        near_tie_margin: Tokens whose margin in the reference is no larger do not count for top-1, logits.
    """
    counted = (scores.margin > near_tie_margin).astype(np.float64)
    return {
        "delta_nll": paired_interval(scores.nll - scores.reference_nll),
        "top1_agreement": ratio_interval(scores.agrees * counted, counted) if counted.any() else None,
        "relative_logit_error": ratio_interval(scores.mean_error, np.maximum(scores.spread, np.finfo(np.float32).tiny)),
        "max_abs_logit_error": float(scores.largest_error.max()),
        "mean_kl": bootstrap_mean(scores.kl),
        "top10_overlap": bootstrap_mean(scores.overlap),
        "probability_change": bootstrap_interval(
            window_sums(scores.probability_change**2, np.ones_like(scores.nll)), lambda sums: np.sqrt(ratio(sums))
        ),
    }


def corpus_statistics(scores: Scores) -> dict[str, Any]:
    """Every distribution of one regime, see the module; all tokens must have been compared and be finite."""
    delta, own = bootstrap_mean(scores.nll - scores.reference_nll), bootstrap_mean(scores.nll)
    difference = bootstrap_interval(
        window_sums(scores.nll, scores.reference_nll, np.ones_like(scores.nll)), _perplexity_difference
    )
    top1, change = bootstrap_mean(scores.agrees), bootstrap_mean(scores.probability_change)
    return {
        "perplexity_ci": (_exp(own.low), _exp(own.high)),
        "perplexity_ratio": _exp(delta.mean),
        "perplexity_ratio_ci": (_exp(delta.low), _exp(delta.high)),
        "perplexity_difference": difference.mean,
        "perplexity_difference_ci": difference.ends,
        "delta_nll_bootstrap_ci": delta.ends,
        "log_perplexity_correlation": _correlation(scores.nll, scores.reference_nll),
        "kl": _percentiles(scores.kl, _PERCENTILES),
        "kl_histogram": kl_histogram(scores.kl),
        "probability_change": {
            "mean": change.mean,
            "mean_ci": change.ends,
            **_percentiles(scores.probability_change, {**_PERCENTILES, "p25": 25, "p75": 75}),
        },
        "top1_all": top1.mean,
        "top1_all_ci": top1.ends,
        "by_position": [_range(scores, start, stop) for start, stop in _position_ranges(scores)],
    }


def kl_histogram(kl: np.ndarray) -> dict[str, list]:
    """Tokens per bin of log10 KL; those outside the edges are in the outermost bins."""
    with np.errstate(divide="ignore"):
        inside = np.clip(np.log10(kl), KL_EDGES[0], KL_EDGES[-1])
    return {"edges": list(KL_EDGES), "counts": np.histogram(inside, KL_EDGES)[0].tolist()}


def _position_ranges(scores: Scores) -> list[tuple[int, int]]:
    """Ranges of positions in the window: from 0 to 1, 2, 4, ... and to the training length, as far as it was scored."""
    first, last = scores.start, scores.start + scores.nll.shape[1]
    edges = {2**power for power in range(last.bit_length())} | {scores.trained or 0}
    inner = sorted(edge for edge in edges if first < edge < last)
    return list(zip([first, *inner], [*inner, last], strict=True))


def _range(scores: Scores, start: int, stop: int) -> dict[str, Any]:
    columns = slice(start - scores.start, stop - scores.start)
    delta = bootstrap_mean((scores.nll - scores.reference_nll)[:, columns])
    kl = bootstrap_mean(scores.kl[:, columns])
    return {
        "start": start, "stop": stop, "delta_nll": delta.mean, "delta_nll_ci": delta.ends, "kl": kl.mean,
        "kl_ci": kl.ends,
    }  # fmt: skip


def _percentiles(values: np.ndarray, wanted: Mapping[str, float]) -> dict[str, float]:
    """Linear interpolation between neighbours, as in llama.cpp, and both ends."""
    found = np.percentile(values, [*wanted.values()]).tolist()
    return {**dict(zip(wanted, found, strict=True)), "min": float(values.min()), "max": float(values.max())}


def _perplexity_difference(sums: np.ndarray) -> np.ndarray:
    reference = sums[..., 1] / sums[..., 2]
    # exp(a) - exp(b) = exp(b) (exp(a - b) - 1), which does not cancel.
    return np.exp(reference) * np.expm1((sums[..., 0] - sums[..., 1]) / sums[..., 2])


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


# --- the regime gap
#: The gap on some positions of the windows, not gated, and the paired differences [windows, positions] it stands on.
RegimeGap = tuple[Comparison, np.ndarray]


def reference_gaps(reference: Reference, passes: int) -> list[RegimeGap]:
    """The model's own gap, one per range of :func:`trained_ranges`."""
    step, prefill = (reference_nll(reference, regime, passes) for regime in (STEP, PREFILL))
    row = Comparison(
        target="pytorch-fp32",
        runtime="pytorch",
        graph="model",
        precision="fp32",
        regime=GAP,
        steps=passes,
        arithmetic="fp32",
    )
    ranges = trained_ranges(reference.windows.length, reference.model.config.training_sequence_length)
    return [_regime_gap(row, step, prefill, positions) for positions in ranges]


def trained_ranges(length: int, trained: int | None) -> list[slice]:
    """Positions of a window below and above the training length; all of them where it is not known."""
    if trained is None or trained >= length:
        return [slice(0, length)]
    return [slice(0, trained), slice(trained, length)]


def _regime_gap(row: Comparison, sequential: np.ndarray, parallel: np.ndarray, positions: slice) -> RegimeGap:
    """How far K passes are from the recurrence of the same target, on some positions of the windows.

    Args:
        row: Names.
        sequential: Negative log-likelihoods of the step chain, nats [windows, positions].
        parallel: Those of the K passes.
        positions: Which of them.
    """
    parallel, sequential = parallel[:, positions], sequential[:, positions]
    gap = parallel - sequential
    interval = paired_interval(gap)
    label = f"{GAP} {positions.start}-{positions.stop}"
    if row.runtime == "pytorch":  # the model's own gaps stand side by side where targets differ in K
        label = f"{label}, K={row.steps}"
    row = dataclasses.replace(
        row,
        label=label,
        tokens=gap.size,
        positions=(positions.start, positions.stop),
        nll=float(parallel.mean()),
        reference_nll=float(sequential.mean()),
    )
    return row.judged(measured("delta_nll", f"{label}: delta_nll", interval.mean, interval=interval.ends)), gap


def target_gaps(
    case: ParityCase, graph: str, scores: Mapping[str, Scores], references: Sequence[RegimeGap], tolerances: Tolerances
) -> list[Comparison]:
    """The gap of one target per range of positions, judged against that of PyTorch FP32.

    Args:
        case: The target.
        graph: Graphs that made its K passes and its steps.
        scores: What was measured, per regime that ran to its end; without steps or K passes there is no gap, and their
            regime failed already.
        references: The model's own gaps.
        tolerances: The limits.
    """
    if STEP not in scores or PREFILL not in scores:
        return []
    step, prefill = scores[STEP], scores[PREFILL]
    row = Comparison(
        target=case.target,
        runtime="onnxruntime",
        graph=graph,
        precision=case.precision,
        regime=GAP,
        steps=case.unroll,
        arithmetic=case.arithmetic,
    )
    limit = tolerances.precisions[case.precision].gap_delta_nll
    comparisons = []
    for reference, differences in references:
        first, last = reference.positions or (0, 0)
        own, gap = _regime_gap(row, step.nll, prefill.nll, slice(first, last))
        gated = step.better_than_chance and (step.trained is None or last <= step.trained)
        comparisons.append(judge_gap(own, gap - differences, limit if gated else None))
    return comparisons


def judge_gap(row: Comparison, excess: np.ndarray, limit: float | None) -> Comparison:
    """Judge how much larger a target's regime gap is than FP32's own, paired; None as limit only reports."""
    interval, precision = paired_interval(excess), "" if limit is None else row.precision
    name = f"{row.label}: gap_delta_nll"
    return row.judged(
        measured("gap_delta_nll", name, interval.mean, interval=interval.ends, limit=limit, precision=precision)
    )
