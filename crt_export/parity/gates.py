"""The gates of the corpus level: what a regime's figures have to satisfy, one check each.

Three gates hold only where the reference predicts the text better than a uniform guess would: ``delta_nll``,
``mean_kl`` and ``probability_change`` are costs in nats or probability, which grow with the scale of the logits, and
the logits of a model that does not fit the text have no scale of their own. Elsewhere these are reported. The others
are shares, or relative to the spread of the logits, and judge every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from crt_export.parity.level import AT_LEAST, WITHIN, Check
from crt_export.parity.report import ParityRow
from crt_export.parity.scores import TOP
from crt_export.parity.statistics import Interval
from crt_export.parity.tolerances import Tolerance


def figure_checks(
    label: str, row: ParityRow, figures: Mapping[str, Any], limits: Tolerance, *, vocab: int
) -> tuple[Check, ...]:
    """Judge a regime that ran to its end.

    Args:
        label: What the names of the checks start with.
        row: Its figures.
        figures: Those of :func:`crt_export.parity.corpus_statistics.corpus_statistics`.
        limits: Those of its precision.
        vocab: Size of the vocabulary.
    """
    fits = row.better_than_chance is True
    checks = [
        _delta_nll(row, limits, fits),
        _top1(row, limits),
        _at_most(row, "relative_logit_error", "mean |logit error| in standard deviations of the reference's logits",
                 _number(row.relative_logit_error), row.relative_logit_error_ci, limits.relative_logit_error,
                 "mean |logit error| is {value:.3g} of the logits' standard deviation, above {limit:g}"),
        _at_most(row, "max_abs_logit_error", "largest |logit error|", _number(row.max_abs_logit_error), None,
                 limits.max_abs_logit_error, "largest |logit error| {value:.3g} is above {limit:g}"),
        _at_most(row, "mean_kl", "mean Kullback-Leibler divergence, nats", figures["kl"]["mean"],
                 figures["kl"]["mean_ci"], limits.mean_kl if fits else None,
                 "mean KL divergence {value:.3g} nat is above {limit:g}"),
        _top10(row, figures, limits, vocab),
        _at_most(row, "probability_change", "root mean square change of the probability of the text's next token",
                 figures["probability_change"]["rms"], figures["probability_change"]["rms_ci"],
                 limits.probability_change if fits else None,
                 "probability of the text's next token changes by {value:.3g} (root mean square), above {limit:g}"),
    ]  # fmt: skip
    return tuple(_named(label, check) for check in checks)


def coverage_check(label: str, tokens: int, asked: int, problems: Sequence[str]) -> Check:
    """Whether the regime ran, to its end, and gave finite logits."""
    return Check(
        name=f"{label}: runs",
        figure="tokens compared",
        value=float(tokens),
        limit=float(asked),
        relation=AT_LEAST,
        passed=not problems,
        failures=tuple(problems),
    )


def consistency_check(label: str, precision: str, found: float, limit: float) -> Check:
    """Two forms of one computation inside a target agree; NaN does not."""
    passed = found <= limit
    failure = (
        "two forms of the same computation (logits against head, prefill_pass against prefill) differ by "
        f"{found:.3g} of their largest value, the limit is {limit:g}"
    )
    return Check(
        name=f"{label}: consistency",
        figure="largest difference of two forms of one computation over the largest value",
        value=found,
        limit=limit,
        tolerance=f"{precision}.consistency",
        passed=passed,
        failures=() if passed else (failure,),
    )


def headroom_check(label: str, tensor: str, largest: float, limit: float) -> Check:
    """The largest |value| of any FP16 tensor leaves room."""
    passed = largest <= limit
    failure = f"FP16 tensor {tensor} reaches {largest:.6g}, the limit is {limit:g}"
    return Check(
        name=f"{label}: fp16_headroom",
        figure="largest |value| of any FP16 tensor",
        value=largest,
        limit=limit,
        tolerance="shared.fp16_headroom",
        passed=passed,
        failures=() if passed else (failure,),
    )


def gap_check(label: str, precision: str, excess: Interval, limit: float | None) -> Check:
    """The regime gap of a target beyond that of FP32; None as limit only reports."""
    passed = None if limit is None else excess.within(limit)
    failure = (
        f"K passes and steps are further apart than in FP32: 95 % interval of the excess "
        f"[{excess.low:.3g}, {excess.high:.3g}] nat is not within +-{limit or 0:g}"
    )
    return Check(
        name=f"{label}: gap_delta_nll",
        figure="excess of the regime gap over that of PyTorch FP32, nats per token",
        value=excess.mean,
        interval=(excess.low, excess.high),
        limit=limit,
        relation=WITHIN,
        tolerance="" if limit is None else f"{precision}.gap_delta_nll",
        passed=passed,
        failures=(failure,) if passed is False else (),
    )


def _named(label: str, check: Check) -> Check:
    return Check(**{**vars(check), "name": f"{label}: {check.name}"})


def _delta_nll(row: ParityRow, limits: Tolerance, gated: bool) -> Check:
    low, high = row.delta_nll_ci or (math.nan, math.nan)
    interval = Interval(mean=_number(row.delta_nll), low=low, high=high)
    passed = interval.within(limits.delta_nll) if gated else None
    failure = f"95 % interval of delta NLL [{low:.3g}, {high:.3g}] nat is not within +-{limits.delta_nll:g}"
    return Check(
        name="delta_nll",
        figure="paired difference of the negative log-likelihood, nats per token",
        value=interval.mean,
        interval=(low, high),
        limit=limits.delta_nll if gated else None,
        relation=WITHIN,
        tolerance=f"{row.precision}.delta_nll" if gated else "",
        passed=passed,
        failures=(failure,) if passed is False else (),
    )


def _top1(row: ParityRow, limits: Tolerance) -> Check:
    share, limit = row.top1_agreement, limits.top1_agreement
    failures = []
    if share is None:
        failures.append(f"top-1 was not compared: no token has a margin above {row.near_tie_margin:g} in the reference")
    elif not share >= limit:
        failures.append(f"top-1 agreement {share:.2%} of {row.top1_tokens} tokens is below {limit:.2%}")
    return _at_least(row, "top1_agreement", "share of tokens with the reference's best token, near ties left out",
                     share, row.top1_ci, limit, failures)  # fmt: skip


def _top10(row: ParityRow, figures: Mapping[str, Any], limits: Tolerance, vocab: int) -> Check:
    share, limit = figures["top10_overlap"], limits.top10_overlap
    figure = f"mean share of the {min(TOP, vocab)} likeliest tokens in common"
    if vocab <= TOP:
        # All tokens there are: the overlap is 1 whatever the target says.
        return Check(name="top10_overlap", figure=figure, value=share, interval=figures["top10_ci"], relation=AT_LEAST)
    failures = [] if share >= limit else [f"top-{TOP} overlap {share:.2%} is below {limit:.2%}"]
    return _at_least(row, "top10_overlap", figure, share, figures["top10_ci"], limit, failures)


def _at_least(
    row: ParityRow,
    key: str,
    figure: str,
    share: float | None,
    interval: tuple[float, float] | None,
    limit: float,
    failures: Sequence[str],
) -> Check:
    return Check(
        name=key,
        figure=figure,
        value=share,
        interval=interval,
        limit=limit,
        relation=AT_LEAST,
        tolerance=f"{row.precision}.{key}",
        passed=not failures,
        failures=tuple(failures),
    )


def _at_most(
    row: ParityRow,
    key: str,
    figure: str,
    value: float,
    interval: tuple[float, float] | None,
    limit: float | None,
    sentence: str,
) -> Check:
    """A figure with a largest value; None as limit only reports, NaN fails."""
    passed = None if limit is None else value <= limit
    return Check(
        name=key,
        figure=figure,
        value=value,
        interval=interval,
        limit=limit,
        tolerance="" if limit is None else f"{row.precision}.{key}",
        passed=passed,
        failures=(sentence.format(value=value, limit=limit),) if passed is False else (),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
