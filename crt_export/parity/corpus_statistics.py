"""Figures and distributions of one regime: what ``llama-perplexity --kl-divergence`` prints, and more.

What is judged is a figure (:func:`corpus_figures`), what describes it a statistic (:func:`corpus_statistics`). The keys
of the latter, intervals being 95 % bootstrap intervals [low, high] over windows (:mod:`crt_export.parity.statistics`),
divergences in nats, probabilities as shares of 1:

* ``perplexity_ci``: of the target. ``perplexity_ratio`` (over the reference's; exp of ``delta_nll``),
  ``perplexity_difference``, each with ``_ci``. ``delta_nll_bootstrap_ci``.
* ``log_perplexity_correlation``: of the two negative log-likelihoods, token by token; None where one never varies.
* ``kl``: ``median``, ``min``, ``max`` and percentiles ``p001`` (0.1 %), ``p1``, ``p5``, ``p10``, ``p90``, ``p95``,
  ``p99``, ``p999`` (99.9 %).
* ``kl_histogram``: ``edges``, log10 of nats, the same in every report, and ``counts`` of tokens between them; what lies
  outside, a divergence of 0 too, is in the first or the last bin.
* ``probability_change``: of the text's next token, signed: ``mean``, ``mean_ci``, ``median``, ``min``, ``max`` and
  percentiles ``p001``, ``p1``, ``p5``, ``p10``, ``p25``, ``p75``, ``p90``, ``p95``, ``p99``, ``p999``.
* ``top1_all``, ``top1_all_ci``: share of all tokens with the same best token, near ties included (the gate leaves those
  out).
* ``by_position``: per range of positions in the window (powers of two, and the length the model was trained at)
  ``start``, ``stop``, ``delta_nll``, ``delta_nll_ci``, ``kl``, ``kl_ci``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crt_export.parity.scores import Scores
from crt_export.parity.statistics import (
    Interval,
    bootstrap_interval,
    bootstrap_mean,
    paired_interval,
    ratio,
    ratio_interval,
    window_sums,
)

#: Value and 95 % interval; None where there is none.
Figure = tuple[float | None, tuple[float, float] | None]

#: log10 of nats; fixed, so that two reports can be compared bin by bin.
KL_EDGES = tuple(edge / 2 for edge in range(-40, 5))
_KL_PERCENTILES = {
    "median": 50, "p001": 0.1, "p1": 1, "p5": 5, "p10": 10, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9,
}  # fmt: skip
_CHANGE_PERCENTILES = {
    "median": 50, "p001": 0.1, "p1": 1, "p5": 5, "p10": 10, "p25": 25, "p75": 75, "p90": 90, "p95": 95, "p99": 99,
    "p999": 99.9,
}  # fmt: skip


def corpus_figures(scores: Scores, near_tie_margin: float) -> dict[str, Figure]:
    """Value and interval of every figure that is judged, by metric; all tokens must have been compared and be finite.

    Args:
        scores: What was measured.
        near_tie_margin: Tokens whose margin in the reference is no larger do not count for top-1, logits.
    """
    delta = paired_interval(scores.nll - scores.reference_nll)
    relative = ratio_interval(scores.mean_error, np.maximum(scores.spread, np.finfo(np.float32).tiny))
    counted = (scores.margin > near_tie_margin).astype(np.float64)
    top1 = ratio_interval(scores.agrees * counted, counted) if counted.any() else None
    change = bootstrap_interval(
        window_sums(scores.probability_change**2, np.ones_like(scores.nll)), lambda sums: np.sqrt(ratio(sums))
    )
    figures: dict[str, Interval | None] = {
        "delta_nll": delta,
        "top1_agreement": top1,
        "relative_logit_error": relative,
        "max_abs_logit_error": None,
        "mean_kl": bootstrap_mean(scores.kl),
        "top10_overlap": bootstrap_mean(scores.overlap),
        "probability_change": change,
    }
    found: dict[str, Figure] = {
        key: (None, None) if interval is None else (interval.mean, interval.ends) for key, interval in figures.items()
    }
    return {**found, "max_abs_logit_error": (float(scores.largest_error.max()), None)}


def corpus_statistics(scores: Scores) -> dict[str, Any]:
    """Every distribution of one regime, see the module; all tokens must have been compared and be finite."""
    delta = bootstrap_mean(scores.nll - scores.reference_nll)
    own = bootstrap_mean(scores.nll)
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
        "kl": _percentiles(scores.kl, _KL_PERCENTILES),
        "kl_histogram": kl_histogram(scores.kl),
        "probability_change": {
            "mean": change.mean,
            "mean_ci": change.ends,
            **_percentiles(scores.probability_change, _CHANGE_PERCENTILES),
        },
        "top1_all": top1.mean,
        "top1_all_ci": top1.ends,
        "by_position": [_range(scores, start, stop) for start, stop in position_ranges(scores)],
    }


def kl_histogram(kl: np.ndarray) -> dict[str, list]:
    """Tokens per bin of log10 KL; those outside the edges are in the outermost bins."""
    with np.errstate(divide="ignore"):
        inside = np.clip(np.log10(kl), KL_EDGES[0], KL_EDGES[-1])
    return {"edges": list(KL_EDGES), "counts": np.histogram(inside, KL_EDGES)[0].tolist()}


def position_ranges(scores: Scores) -> list[tuple[int, int]]:
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


def _percentiles(values: np.ndarray, wanted: dict[str, float]) -> dict[str, float]:
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
