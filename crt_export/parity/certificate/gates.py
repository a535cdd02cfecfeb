"""Gates of a certificate: its claims and what they are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from crt_export.parity.certificate.curves import excess_interval, handover_excess
from crt_export.parity.certificate.measurement import Coverage, Measurement
from crt_export.parity.certificate.runs import Anchors, TargetRun
from crt_export.parity.metrics import Check, measured
from crt_export.parity.reference import PREFILL_PASS
from crt_export.parity.statistics import Interval
from crt_export.parity.tolerances import Tolerance


def exactness_checks(
    run: TargetRun, anchors: Anchors, found: Measurement, coverage: Coverage, limits: Tolerance
) -> Iterator[Check]:
    """What holds by the equations, up to rounding, for every model."""
    precision = run.runner.target.profile.precision
    for (graph, tokens, passes), errors in anchors.errors.items():
        name = f"anchor: {passes} passes of {graph} over {tokens} tokens are {tokens} steps"
        yield anchor_check(name, errors, graph, precision, limits)
    index = max(range(len(coverage.passes)), key=lambda k: _nan_last(float(found.prefix_error[k])))
    yield measured(
        "anchor_error",
        f"prefix: after K passes of {PREFILL_PASS} the first K positions are exact",
        float(found.prefix_error[index]),
        limit=limits.anchor_error,
        precision=precision,
        where=f"in next_hidden of {PREFILL_PASS} after {coverage.passes[index]} passes",
    )
    claims = [("step: logits are the head of next_state", run.step_error, "between logits of step and those of head")]
    if not run.runner.one_graph:
        name = f"prefill: {coverage.unroll} passes are {coverage.unroll} calls of {PREFILL_PASS}"
        claims.append((name, anchors.prefill_error, "in next_hidden of prefill"))
    name = f"{PREFILL_PASS}: residual is the change of next_hidden"
    claims.append((name, anchors.residual_error, f"in residual of {PREFILL_PASS}"))
    for name, value, where in claims:
        yield measured("consistency", name, value, limit=limits.consistency, precision=precision, where=where)


def anchor_check(name: str, errors: Mapping[str, float], graph: str, precision: str, limits: Tolerance) -> Check:
    """The worst of the errors by tensor against the limit of what is exact by the equations."""
    worst = max(errors, key=lambda tensor: _nan_last(errors[tensor]))
    where = f"in {worst} of {graph}"
    return measured("anchor_error", name, errors[worst], limit=limits.anchor_error, precision=precision, where=where)


def regime_checks(
    found: Measurement,
    reference: Measurement,
    coverage: Coverage,
    precision: str,
    limits: Tolerance,
    *,
    judged: bool,
) -> Iterator[Check]:
    """Whether the target's regimes are further apart than FP32's, at K and at 2 K passes."""
    for span in coverage.spans:
        limit = limits.gap_delta_nll if judged and coverage.gated(span) else None
        for passes in (coverage.unroll, 2 * coverage.unroll):
            interval = excess_interval(found, reference, coverage.passes.index(passes), span)
            name = f"regime gap beyond FP32's: K={passes}, positions {span.start}-{span.stop}"
            yield excess_check("gap_excess", name, interval, limit, precision)
    for place, continuation in enumerate(found.continuations):
        handover = continuation.handover
        interval = handover_excess(found, reference, place, coverage.selected.index(coverage.unroll))
        name = (
            f"hand-over beyond FP32's: K={coverage.unroll} over {handover.start} tokens, "
            f"steps {handover.start}-{handover.stop}"
        )
        limit = limits.handover_delta_nll if judged and handover.gated else None
        yield excess_check("handover_excess", name, interval, limit, precision)


def excess_check(metric: str, name: str, interval: Interval, limit: float | None, precision: str) -> Check:
    """An interval that has to lie in [-limit, limit]; None only reports it, NaN fails."""
    ends = (interval.low, interval.high)
    return measured(metric, name, interval.mean, interval=ends, limit=limit, precision=precision)


def reported_checks(data: Mapping[str, Any], coverage: Coverage) -> Iterator[Check]:
    """Figures that belong to the model or to the method and gate nothing."""
    unroll, last = coverage.passes.index(coverage.unroll), coverage.passes[-1]
    for span in data["spans"]:
        where = f"positions {span['start']}-{span['stop']}"
        yield measured("smallest_passes", f"smallest K: {where}", span["smallest_passes"])
        name, interval = f"perplexity gap: K={coverage.unroll}, {where}", span["perplexity_gap_ci"][unroll]
        yield measured("perplexity_gap", name, span["perplexity_gap"][unroll], interval=interval)
        # At twice the unroll FP32 still converges, while a quantised target has met the floor of its rounding.
        for passes, index in ((coverage.unroll, unroll), (last, len(coverage.passes) - 1)):
            name, interval = f"divergence: K={passes}, {where}", span["kl_ci"][index]
            yield measured("pass_divergence", name, span["kl"][index], interval=interval)
    yield measured("residual_ratio", f"residual: K={coverage.unroll}", data["residual"][unroll]["ratio_p95"])


def _nan_last(error: float) -> float:
    """NaN is the largest of all errors."""
    return math.inf if math.isnan(error) else error
