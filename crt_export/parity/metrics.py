"""Metrics of parity: one table of what is measured, what it is held against, and what a failure says.

Everything that shows or judges a figure reads this table: the gates of every level, ``report.json`` with its schema,
``compare``, JUnit, the tables of the command line and the HTML page. A new figure is a line here, the function that
computes it, and, where it is gated, a limit with its reason in ``validate/tolerances.toml``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AT_MOST = "at most"
AT_LEAST = "at least"
WITHIN = "within"  # the whole interval lies in [-limit, limit]

_AT_MOST_SENTENCE = "{figure} is {value:.3g}{where}, expected at most {limit:g} ({tolerance})"
_WITHIN_SENTENCE = "95 % interval of the {figure} is [{low:.3g}, {high:.3g}], expected within +-{limit:g} ({tolerance})"
_RELATIVE = "largest error / largest |value|"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure.

    Attributes:
        key: Its name in ``report.json``.
        figure: What the value is, with its unit.
        limit: Key of its limit among those of a precision, or among the shared ones; empty where it has none.
        relation: How value or interval relate to the limit: ``at most``, ``at least`` or ``within``.
        sentence: What a failure says: ``value``, ``limit``, ``low``, ``high``, ``where``, ``figure``, ``tolerance``,
            and what the caller adds.
        title: Above a column of it; empty where no table shows it.
        share: Whether it is a share of 1, shown as a percentage.
        nats: Whether it is a cost in nats or probability, which says nothing of a model that does not fit the text.
    """

    key: str
    figure: str
    limit: str = ""
    relation: str = AT_MOST
    sentence: str = _AT_MOST_SENTENCE
    title: str = ""
    share: bool = False
    nats: bool = False


METRICS: Mapping[str, Metric] = {
    metric.key: metric
    for metric in (
        # own-model
        Metric(key="own_model_logits", limit="own_model_error",
               figure="largest |logit difference| over the logits' standard deviation"),
        Metric(key="own_model_hidden", limit="own_model_error",
               figure="largest |difference of h| over its standard deviation"),
        # contract
        Metric(key="weight_distance", limit="weight_rounding",
               figure="distance from the checkpoint, quantisation steps"),
        Metric(key="weights_changed", figure="values that differ from the checkpoint"),
        # one-step, chain, and two graphs of one computation
        Metric(key="tensor_error", limit="tensor_error", figure=_RELATIVE),
        Metric(key="chain_error", limit="chain_error", figure=_RELATIVE),
        Metric(key="consistency", limit="consistency", figure=_RELATIVE),
        Metric(key="bit_differences", figure="values that differ in a bit"),
        Metric(key="steps", relation=AT_LEAST, figure="steps compared in every window"),
        # corpus
        Metric(key="tokens", relation=AT_LEAST, figure="tokens compared"),
        Metric(key="text_nll", limit="learnt_share",
               figure="negative log-likelihood of the text under PyTorch FP32, nats per token"),
        Metric(key="delta_nll", limit="delta_nll", relation=WITHIN, nats=True, title="Δ NLL, nats",
               figure="paired difference of the negative log-likelihood, nats per token",
               sentence="95 % interval of delta NLL [{low:.3g}, {high:.3g}] nat is not within +-{limit:g}"),
        Metric(key="gap_delta_nll", limit="gap_delta_nll", relation=WITHIN, nats=True, title="Δ NLL, nats",
               figure="excess of the regime gap over that of PyTorch FP32, nats per token",
               sentence="K passes and steps are further apart than in FP32: 95 % interval of the excess "
               "[{low:.3g}, {high:.3g}] nat is not within +-{limit:g}"),
        Metric(key="mean_kl", limit="mean_kl", nats=True, title="Mean KL, nats",
               figure="mean Kullback-Leibler divergence, nats",
               sentence="mean KL divergence {value:.3g} nat is above {limit:g}"),
        Metric(key="top1_agreement", limit="top1_agreement", relation=AT_LEAST, share=True, title="Top-1",
               figure="share of tokens with the reference's best token, near ties left out",
               sentence="top-1 agreement {value:.2%} of {tokens} tokens is below {limit:.2%}"),
        Metric(key="top10_overlap", limit="top10_overlap", relation=AT_LEAST, share=True,
               figure="mean share of the 10 likeliest tokens in common, of all where there are fewer",
               sentence="top-10 overlap {value:.2%} is below {limit:.2%}"),
        Metric(key="probability_change", limit="probability_change", nats=True,
               figure="root mean square change of the probability of the text's next token",
               sentence="probability of the text's next token changes by {value:.3g} (root mean square), above "
               "{limit:g}"),
        Metric(key="relative_logit_error", limit="relative_logit_error", title="Relative logit error",
               figure="mean |logit error| in standard deviations of the reference's logits",
               sentence="mean |logit error| is {value:.3g} of the logits' standard deviation, above {limit:g}"),
        Metric(key="max_abs_logit_error", limit="max_abs_logit_error", title="Max error",
               figure="largest |logit error|", sentence="largest |logit error| {value:.3g} is above {limit:g}"),
        Metric(key="regime_consistency", limit="consistency",
               figure="largest difference of two forms of one computation over the largest value",
               sentence="two forms of the same computation (logits against head, prefill_pass against prefill) differ "
               "by {value:.3g} of their largest value, the limit is {limit:g}"),
        Metric(key="fp16_headroom", limit="fp16_headroom", figure="largest |value| of any FP16 tensor",
               sentence="FP16 tensor {tensor} reaches {value:.6g}, the limit is {limit:g}"),
        # free-running
        Metric(key="divergence_margin", limit="divergence_margin",
               figure="largest margin of the reference at a first divergence / standard deviation of its logits"),
        Metric(key="agreement", relation=AT_LEAST, share=True,
               figure="tokens before the first divergent one / new tokens"),
        # certificate
        Metric(key="anchor_error", limit="anchor_error", figure=_RELATIVE),
        Metric(key="gap_excess", limit="gap_delta_nll", relation=WITHIN, nats=True, sentence=_WITHIN_SENTENCE,
               figure="excess of (NLL of K passes - NLL of the recurrence), nat per token"),
        Metric(key="handover_excess", limit="handover_delta_nll", relation=WITHIN, nats=True,
               sentence=_WITHIN_SENTENCE,
               figure="excess of (NLL of steps after K passes - NLL of the recurrence), nat per token"),
        Metric(key="smallest_passes", limit="perplexity_gap",
               figure="smallest K that holds |perplexity gap| within the limit with 95 % confidence, all larger K too"),
        Metric(key="perplexity_gap", limit="perplexity_gap",
               figure="perplexity of K passes - perplexity of the recurrence"),
        Metric(key="pass_divergence", figure="mean KL of K passes from the recurrence, nat"),
        Metric(key="residual_ratio",
               figure="true error / residual, 95th percentile of windows; at most 1 where the residual bounds the "
               "error"),
        # long-run
        Metric(key="non_finite", figure="steps with a NaN or an infinity"),
        Metric(key="run_logit_error", limit="relative_logit_error",
               figure="mean |logit error| / standard deviation of the logits"),
        Metric(key="growth", limit="growth", figure="growth of the logit error over the run / its mean"),
        Metric(key="growth_rate", figure="growth of the relative logit error per 1,000 tokens"),
        Metric(key="run_headroom", limit="fp16_headroom", figure="largest |value| of an FP16 tensor"),
        Metric(key="state_norm", limit="state_norm",
               figure="largest |log ratio| of the state's norm to the reference's in a block"),
    )
}  # fmt: skip
#: Limits that hold for every precision.
SHARED_LIMITS = (
    "near_tie_margin", "fp16_headroom", "perplexity_gap", "weight_rounding", "learnt_share", "own_model_error",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was asked of a target, what was measured for it, and whether it holds.

    Attributes:
        name: What was checked, unique within its level and target: ``step: present_key_values.0.key``.
        metric: Which figure of ``METRICS`` was measured; empty where nothing was.
        value: The figure; None where there is none.
        interval: Its 95 % confidence interval.
        limit: What it is held against; None where it is reported only.
        tolerance: Key of the limit in ``validate/tolerances.toml``, such as ``w8.delta_nll``; empty where it has none.
        passed: None where nothing is gated.
        failures: Sentences on what is wrong, empty if nothing: expected, found, where (graph, tensor, step).
    """

    name: str
    metric: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    limit: float | None = None
    tolerance: str = ""
    passed: bool | None = None
    failures: tuple[str, ...] = ()

    @property
    def figure(self) -> str:
        """What the value is, with its unit; empty where nothing is measured."""
        return METRICS[self.metric].figure if self.metric else ""

    @property
    def relation(self) -> str:
        """How value or interval relate to the limit: ``at most``, ``at least`` or ``within``."""
        return METRICS[self.metric].relation if self.metric else AT_MOST

    @property
    def limit_usage(self) -> float:
        """The share of its limit that a check uses up: 1 is at the limit, above 1 beyond it.

        0 where nothing is measured or nothing is held against it; infinity for a failure without a figure. Of a share
        that must be at least the limit, what counts is how much of what may be missing is missing; a count, such as the
        tokens that were asked for, is there or is not.
        """
        value, limit = self.value, self.limit
        if self.relation == WITHIN and limit and self.interval:
            return max((abs(end) for end in self.interval if end is not None), default=math.inf) / limit
        if not limit or value is None:
            return math.inf if self.passed is False else 0.0
        if self.relation == AT_LEAST:
            return (1 - value) / (1 - limit) if limit < 1 else 0.0 if value >= limit else math.inf
        return abs(value) / limit if self.relation == WITHIN else value / limit

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Check:
        """Read what :func:`json_value` made of it."""
        fixed: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        if fixed.get("metric", "") not in ("", *METRICS):
            raise KeyError(f"metric {fixed['metric']!r:.60}")
        return cls(**fixed)


def measured(
    metric: str,
    name: str,
    value: float | None,
    *,
    interval: tuple[float, float] | None = None,
    limit: float | None = None,
    precision: str = "",
    where: str = "",
    failures: Sequence[str] | None = None,
    **words: object,
) -> Check:
    """Judge a figure; NaN fails.

    Args:
        metric: Key of ``METRICS``.
        name: What was checked.
        value: What was measured; None where there is nothing to state, which says why in ``failures``.
        interval: Its 95 % interval; the one that has to lie within the limit, where the metric asks that.
        limit: What it is held against; None reports only.
        precision: Whose limit that is; shared limits have none.
        where: Where the value was found, for the failure: ``at step 12 of window 3``.
        failures: What is wrong, where the caller judges; None judges by the table.
        words: What else the metric's sentence names.
    """
    row = METRICS[metric]
    tolerance = f"{'shared' if row.limit in SHARED_LIMITS else precision}.{row.limit}"
    tolerance = tolerance if row.limit and (limit is not None or precision or row.limit in SHARED_LIMITS) else ""
    if failures is None and limit is not None:
        low, high = interval or (math.nan, math.nan)
        held = {
            AT_MOST: value is not None and value <= limit,
            AT_LEAST: value is not None and value >= limit,
            WITHIN: -limit <= low and high <= limit,
        }[row.relation]
        words |= {"value": value, "limit": limit, "low": low, "high": high, "figure": row.figure,
                  "tolerance": tolerance, "where": f" {where}" if where else ""}  # fmt: skip
        failures = () if held else (row.sentence.format(**words),)
    return Check(
        name=name,
        metric=metric,
        value=value,
        interval=interval,
        limit=limit,
        tolerance=tolerance,
        passed=None if limit is None and not failures else not failures,
        failures=tuple(failures or ()),
    )


def claim(name: str, problems: Iterable[str] = ()) -> Check:
    """A check that no figure stands for: it holds where there are no problems."""
    failures = tuple(problems)
    return Check(name=name, passed=not failures, failures=failures)


def failed_check(name: str, *failures: str) -> Check:
    """A check that does not hold, or could not be looked at, for reasons that no figure gives."""
    return claim(name, failures)


def json_value(value: Any) -> Any:
    """JSON-ready form; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_value(vars(value))
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [json_value(item) for item in value]
        # An interval with one unknown end is no interval.
        return None if len(items) == 2 and isinstance(value, tuple) and None in items else items
    return value
