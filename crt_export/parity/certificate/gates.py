"""The claims of a certificate and what they are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from crt_export.parity.certificate.anchors import Anchors
from crt_export.parity.certificate.coverage import Coverage
from crt_export.parity.certificate.handover import handover_excess
from crt_export.parity.certificate.measurement import Measurement
from crt_export.parity.certificate.spans import excess_interval
from crt_export.parity.certificate.target_form import TargetForm
from crt_export.parity.level import WITHIN, Check, gate_at_most
from crt_export.parity.statistics import Interval
from crt_export.parity.tolerances import Tolerance

RELATIVE = "largest error / largest |value|"


def exactness_checks(
    form: TargetForm, anchors: Anchors, measured: Measurement, coverage: Coverage, limits: Tolerance
) -> list[Check]:
    """What holds by the equations, up to rounding, for every model."""
    precision, graph = form.case.precision, form.pass_graph
    key = f"{precision}.anchor_error"
    checks = []
    for (name, tokens, passes), errors in anchors.errors.items():
        worst = _worst(errors)
        label = f"anchor: {passes} passes of {name} over {tokens} tokens are {tokens} steps"
        checks.append(
            gate_at_most(label, RELATIVE, errors[worst], limits.anchor_error, key, where=f"in {worst} of {name}")
        )
    index = max(range(len(coverage.passes)), key=lambda k: _nan_last(float(measured.prefix_error[k])))
    checks.append(
        gate_at_most(
            f"prefix: after K passes of {graph} the first K positions are exact",
            RELATIVE,
            float(measured.prefix_error[index]),
            limits.anchor_error,
            key,
            where=f"in next_hidden of {graph} after {coverage.passes[index]} passes",
        )
    )
    key = f"{precision}.consistency"
    forms = [("step: logits are the head of next_state", form.step_error, "between logits of step and those of head")]
    if form.stride == 1:
        forms += [
            (
                f"prefill: {coverage.unroll} passes are {coverage.unroll} calls of {graph}",
                anchors.prefill_error,
                "in next_hidden of prefill",
            ),
            (f"{graph}: residual is the change of next_hidden", anchors.residual_error, f"in residual of {graph}"),
        ]
    return checks + [
        gate_at_most(name, RELATIVE, value, limits.consistency, key, where=where) for name, value, where in forms
    ]


def regime_checks(
    measured: Measurement,
    reference: Measurement,
    coverage: Coverage,
    precision: str,
    limits: Tolerance,
    *,
    judged: bool,
) -> list[Check]:
    """Whether the target's regimes are further apart than FP32's, at K and at 2 K passes."""
    checks = []
    for span in coverage.spans:
        for passes in (coverage.unroll, 2 * coverage.unroll):
            interval = excess_interval(measured, reference, coverage.passes.index(passes), span)
            checks.append(
                gate_within(
                    f"regime gap beyond FP32's: K={passes}, positions {span.start}-{span.stop}",
                    "excess of (NLL of K passes - NLL of the recurrence), nat per token",
                    interval,
                    limits.gap_delta_nll if judged and coverage.gated(span) else None,
                    f"{precision}.gap_delta_nll",
                )
            )
    for place, continuation in enumerate(measured.continuations):
        handover = continuation.handover
        interval = handover_excess(measured, reference, place, coverage.selected.index(coverage.unroll))
        checks.append(
            gate_within(
                f"hand-over beyond FP32's: K={coverage.unroll} over {handover.start} tokens, "
                f"steps {handover.start}-{handover.stop}",
                "excess of (NLL of steps after K passes - NLL of the recurrence), nat per token",
                interval,
                limits.handover_delta_nll if judged and handover.gated else None,
                f"{precision}.handover_delta_nll",
            )
        )
    return checks


def reported_checks(data: Mapping[str, Any], coverage: Coverage, perplexity_gap: float) -> Iterator[Check]:
    """Figures that belong to the model or to the method and gate nothing."""
    unroll, last = coverage.passes.index(coverage.unroll), coverage.passes[-1]
    for span in data["spans"]:
        where = f"positions {span['start']}-{span['stop']}"
        yield Check(
            name=f"smallest K: {where}",
            figure=f"smallest K that holds |perplexity gap| <= {perplexity_gap:g} with 95 % confidence, all larger "
            f"K up to {last} too",
            value=span["smallest_passes"],
            tolerance="shared.perplexity_gap",
        )
        yield Check(
            name=f"perplexity gap: K={coverage.unroll}, {where}",
            figure="perplexity of K passes - perplexity of the recurrence",
            value=span["perplexity_gap"][unroll],
            interval=span["perplexity_gap_ci"][unroll],
            tolerance="shared.perplexity_gap",
        )
        # At twice the unroll FP32 still converges, while a quantised target has met the floor of its rounding.
        for passes, index in ((coverage.unroll, unroll), (last, len(coverage.passes) - 1)):
            yield Check(
                name=f"divergence: K={passes}, {where}",
                figure="mean KL of K passes from the recurrence, nat",
                value=span["kl"][index],
                interval=span["kl_ci"][index],
            )
    yield Check(
        name=f"residual: K={coverage.unroll}",
        figure="true error / residual, 95th percentile of windows; at most 1 where the residual bounds the error",
        value=data["residual"][unroll]["ratio_p95"],
    )


def gate_within(name: str, figure: str, interval: Interval, limit: float | None, tolerance: str) -> Check:
    """An interval that has to lie in [-limit, limit]; None only reports it, NaN fails."""
    failures = ()
    if limit is not None and not interval.within(limit):
        failures = (
            f"95 % interval of the {figure} is [{interval.low:.3g}, {interval.high:.3g}], expected within "
            f"+-{limit:g} ({tolerance})",
        )
    return Check(
        name=name,
        figure=figure,
        value=interval.mean,
        interval=(interval.low, interval.high),
        limit=limit,
        relation=WITHIN,
        tolerance=tolerance,
        passed=None if limit is None else not failures,
        failures=failures,
    )


def _worst(errors: Mapping[str, float]) -> str:
    return max(errors, key=lambda name: _nan_last(errors[name]))


def _nan_last(error: float) -> float:
    """NaN is the largest of all errors."""
    return math.inf if math.isnan(error) else error
