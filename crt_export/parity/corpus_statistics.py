"""Scores of one regime -> the figures of the corpus level: what ``llama-perplexity --kl-divergence`` prints, and more.

The keys of :func:`corpus_statistics`, intervals being 95 % bootstrap intervals [low, high] over windows
(:mod:`crt_export.parity.statistics`), divergences in nats, probabilities as shares of 1:

* ``perplexity``, ``perplexity_ci``: of the target. ``perplexity_ratio`` (over the reference's; exp of
  ``delta_nll``), ``perplexity_difference``, each with ``_ci``. ``delta_nll_bootstrap_ci``.
* ``log_perplexity_correlation``: of the two negative log-likelihoods, token by token; None where one never varies.
* ``kl``: ``mean``, ``mean_ci``, ``median``, ``min``, ``max`` and percentiles ``p001`` (0.1 %), ``p1``, ``p5``,
  ``p10``, ``p90``, ``p95``, ``p99``, ``p999`` (99.9 %).
* ``kl_histogram``: ``edges``, log10 of nats, the same in every report, and ``counts`` of tokens between them; what lies
  outside, a divergence of 0 too, is in the first or the last bin.
* ``probability_change``: of the text's next token, signed: ``mean``, ``mean_ci``, ``rms``, ``rms_ci``, ``median``,
  ``min``, ``max`` and percentiles ``p001``, ``p1``, ``p5``, ``p10``, ``p25``, ``p75``, ``p90``, ``p95``, ``p99``,
  ``p999``.
* ``top1_agreement``, ``top1_ci``: share of all tokens with the same best token, near ties included (the gate leaves
  those out). ``top10_overlap``, ``top10_ci``.
* ``by_position``: per span of positions in the window (powers of two, and the length the model was trained at)
  ``start``, ``stop``, ``delta_nll``, ``delta_nll_ci``, ``kl``, ``kl_ci``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crt_export.parity.scores import Scores
from crt_export.parity.statistics import bootstrap_interval, bootstrap_mean, window_sums

#: log10 of nats; fixed, so that two reports can be compared bin by bin.
KL_EDGES = tuple(edge / 2 for edge in range(-40, 5))
_KL_PERCENTILES = {
    "median": 50, "p001": 0.1, "p1": 1, "p5": 5, "p10": 10, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9,
}  # fmt: skip
_CHANGE_PERCENTILES = {
    "median": 50, "p001": 0.1, "p1": 1, "p5": 5, "p10": 10, "p25": 25, "p75": 75, "p90": 90, "p95": 95, "p99": 99,
    "p999": 99.9,
}  # fmt: skip


def corpus_statistics(scores: Scores) -> dict[str, Any]:
    """Every figure of one regime, see the module; all tokens must have been compared and be finite."""
    delta = bootstrap_mean(scores.nll - scores.reference_nll)
    own = bootstrap_mean(scores.nll)
    difference = bootstrap_interval(
        window_sums(scores.nll, scores.reference_nll, np.ones_like(scores.nll)), _perplexity_difference
    )
    top1, top10 = bootstrap_mean(scores.agrees), bootstrap_mean(scores.overlap)
    return {
        "perplexity": _exp(own.mean),
        "perplexity_ci": (_exp(own.low), _exp(own.high)),
        "perplexity_ratio": _exp(delta.mean),
        "perplexity_ratio_ci": (_exp(delta.low), _exp(delta.high)),
        "perplexity_difference": difference.mean,
        "perplexity_difference_ci": difference.ends,
        "delta_nll_bootstrap_ci": delta.ends,
        "log_perplexity_correlation": _correlation(scores.nll, scores.reference_nll),
        "kl": _kl(scores.kl),
        "kl_histogram": kl_histogram(scores.kl),
        "probability_change": _probability_change(scores.probability_change),
        "top1_agreement": top1.mean,
        "top1_ci": top1.ends,
        "top10_overlap": top10.mean,
        "top10_ci": top10.ends,
        "by_position": [_span(scores, start, stop) for start, stop in position_spans(scores)],
    }


def kl_histogram(kl: np.ndarray) -> dict[str, list]:
    """Tokens per bin of log10 KL; those outside the edges are in the outermost bins."""
    with np.errstate(divide="ignore"):
        inside = np.clip(np.log10(kl), KL_EDGES[0], KL_EDGES[-1])
    return {"edges": list(KL_EDGES), "counts": np.histogram(inside, KL_EDGES)[0].tolist()}


def position_spans(scores: Scores) -> list[tuple[int, int]]:
    """Spans of positions in the window: from 0 to 1, 2, 4, ... and to the training length, as far as it was scored."""
    first, last = scores.start, scores.start + scores.nll.shape[1]
    edges = {2**power for power in range(last.bit_length())} | {scores.trained or 0}
    inner = sorted(edge for edge in edges if first < edge < last)
    return list(zip([first, *inner], [*inner, last], strict=True))


def _span(scores: Scores, start: int, stop: int) -> dict[str, Any]:
    columns = slice(start - scores.start, stop - scores.start)
    delta = bootstrap_mean((scores.nll - scores.reference_nll)[:, columns])
    kl = bootstrap_mean(scores.kl[:, columns])
    return {
        "start": start, "stop": stop, "delta_nll": delta.mean, "delta_nll_ci": delta.ends, "kl": kl.mean,
        "kl_ci": kl.ends,
    }  # fmt: skip


def _kl(values: np.ndarray) -> dict[str, Any]:
    mean = bootstrap_mean(values)
    return {"mean": mean.mean, "mean_ci": mean.ends, **_percentiles(values, _KL_PERCENTILES)}


def _probability_change(values: np.ndarray) -> dict[str, Any]:
    mean = bootstrap_mean(values)
    rms = bootstrap_interval(window_sums(values**2, np.ones_like(values)), _root_mean)
    ends = {"mean_ci": mean.ends, "rms": rms.mean, "rms_ci": rms.ends}
    return {"mean": mean.mean, **ends, **_percentiles(values, _CHANGE_PERCENTILES)}


def _percentiles(values: np.ndarray, wanted: dict[str, float]) -> dict[str, float]:
    """Linear interpolation between neighbours, as in llama.cpp, and both ends."""
    found = np.percentile(values, [*wanted.values()]).tolist()
    return {**dict(zip(wanted, found, strict=True)), "min": float(values.min()), "max": float(values.max())}


def _root_mean(sums: np.ndarray) -> np.ndarray:
    return np.sqrt(sums[..., 0] / sums[..., 1])


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
