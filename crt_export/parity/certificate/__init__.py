"""Level L5, the regime certificate: K parallel passes against the recurrence, for every K, as the target is deployed.

Each target is measured against its own recurrence: its step chain over each window from position 0, and K passes over
the same window as one chunk, for K from 1 to twice its unroll. Both regimes' h go through the target's head, so their
difference is that of the states. How far FP32 itself is apart belongs to the model; a target is gated by the excess
over that, below the training length and where FP32 predicts the text better than chance. What the equations say exactly
(T passes over T tokens are T steps, the first K positions after K passes) is gated for every model.

``data`` (lists are per K of ``passes``, intervals 95 % over windows, nats unless said otherwise):

* ``unroll``, ``trained`` (training length or None), ``window`` (tokens), ``windows``, ``passes``;
* ``spans``: per span ``start``, ``stop``, ``gated``, ``sequential_nll``, ``sequential_perplexity``, ``nll``,
  ``perplexity``, ``gap_nll`` and ``gap_nll_ci`` (K passes - recurrence), ``perplexity_gap`` and ``perplexity_gap_ci``
  (delta method), ``kl`` and ``kl_ci`` (of K passes from the recurrence), ``excess`` and ``excess_ci`` (gap - FP32's
  gap; None in ``reference``), ``smallest_passes`` (smallest K whose perplexity gap lies within
  ``shared.perplexity_gap`` with 95 % confidence, and that of all larger K; None where there is none);
* ``positions``: ``edges`` of buckets, ``passes``, ``gap_nll``, ``gap_nll_ci``, ``kl``, ``kl_ci``, each a list
  per K of a list per bucket;
* ``residual``: per K ``passes``, ``residual_median``, ``error_median``, ``error_max`` (largest |h - h of the
  recurrence|), ``ratio_median`` and ``ratio_p95`` (error / residual), ``correlation`` (of their logarithms), all over
  windows;
* ``prefix``: per K the largest error of the first K positions over the largest |h|;
* ``anchors``: ``graph``, ``tokens``, ``passes``, ``error`` (largest of ``tensors``), ``limit``, ``tensors``;
* ``handover``: steps continuing from K passes over ``start`` tokens up to ``stop``, below the training length:
  ``passes`` (some), ``delta_nll``, ``delta_nll_ci``, ``kl``, ``kl_ci``, ``max_state_error`` (largest |h error| over the
  largest |h|), ``excess``, ``excess_ci``, ``gated``; ``handover_above``: the same above it, None where the windows do
  not reach that far;
* ``stopping``: where passes may stop by their residual (:mod:`crt_export.parity.certificate.curves`): ``bound``,
  ``perplexity_gap`` and ``perplexity_gap_ci`` of windows stopped there, ``passes_mean``, ``passes_most``, and
  ``unreached`` (share of windows that went token by token); None where no bound holds;
* ``reference``: the same ``spans``, ``positions``, ``residual``, ``prefix``, ``stopping``, ``handover`` and
  ``handover_above`` of PyTorch FP32.

A plain transformer has no passes: its lists are empty, and its one anchor is prefill against the step chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from crt_export.errors import ContractError
from crt_export.parity.certificate.curves import (
    excess_interval,
    handover_curves,
    handover_excess,
    position_curves,
    residual_curve,
    span_curves,
    stopping_bound,
)
from crt_export.parity.certificate.measurement import Coverage, Measurement, coverage_of, measure
from crt_export.parity.certificate.runs import Anchors, ReferenceRun, TargetRun, plain_errors
from crt_export.parity.levels import CERTIFICATE
from crt_export.parity.metrics import Check, json_value, measured
from crt_export.parity.reference import PREFILL, PREFILL_PASS
from crt_export.parity.report import LevelResult
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.tolerances import Tolerance


def certify(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Measure both regimes of a target for every number of passes.

    Args:
        case: The target.
        setup: Reference, windows and limits.

    Returns:
        Gates of exactness and of what the target adds to FP32's own regime gap, figures of the model, and all curves.

    Raises:
        ContractError: A graph is missing, failed, or delivered NaN or infinity.
    """
    runner = setup.runner(case)
    if setup.config.carried.iterated and PREFILL_PASS not in runner.target.graphs:
        raise ContractError(f"target {case.target} has no {PREFILL_PASS} graph, which every number of passes needs")
    coverage = coverage_of(runner, setup, runner.engine.max_tokens)
    if not setup.config.carried.iterated:
        return _certify_plain(case, setup, runner, coverage)
    reference = _measured_reference(setup, coverage)
    run = TargetRun(
        runner,
        setup.windows.inputs[: coverage.windows, : coverage.length],
        kept=[tokens - 1 for tokens in (*coverage.anchors, min(coverage.unroll, coverage.length))],
    )
    anchors = Anchors(run, coverage.anchors, coverage.unroll)
    found = measure(run, coverage, setup, f"{case.target}: certificate", anchors)
    limits = setup.limits(case.precision)
    better = float(reference.sequential_nll.mean()) < math.log(setup.config.vocab_size)
    perplexity_gap = setup.tolerances.perplexity_gap
    data = {
        **_extent(coverage),
        **_curves(found, coverage, reference, perplexity_gap),
        "anchors": _anchor_entries(anchors.errors, limits.anchor_error),
        "reference": _curves(reference, coverage, None, perplexity_gap),
    }
    checks = [
        *_exactness_checks(run, anchors, found, coverage, limits),
        *_regime_checks(found, reference, coverage, case.precision, limits, judged=better and coverage.whole),
        *_reported_checks(data, coverage),
    ]
    return LevelResult(
        level=CERTIFICATE,
        target=case.target,
        checks=tuple(checks),
        data=json_value(data),
        notes=(*coverage.notes, *_notes(coverage, better=better)),
    )


def _certify_plain(case: ParityCase, setup: ParitySetup, runner: Runner, coverage: Coverage) -> LevelResult:
    limits, length = setup.limits(case.precision), coverage.length
    setup.progress(f"{case.target}: certificate", 0, coverage.windows)
    run = TargetRun(runner, setup.windows.inputs[: coverage.windows, :length], kept=(length - 1,))
    errors = plain_errors(run, coverage.slices, length)
    name = f"anchor: prefill over {length} tokens is {length} steps"
    check = _anchor_check(name, errors, PREFILL, case.precision, limits)
    data = {
        **_extent(coverage),
        "passes": [],
        "spans": [],
        "positions": {"edges": [], "passes": [], "gap_nll": [], "gap_nll_ci": [], "kl": [], "kl_ci": []},
        "residual": [],
        "prefix": [],
        "anchors": _anchor_entries({(PREFILL, length, 1): errors}, limits.anchor_error),
        "handover": {name: [] for name in ("passes", "delta_nll", "delta_nll_ci", "kl", "max_state_error")},
        "handover_above": None,
        "stopping": None,
        "reference": None,
    }
    note = (
        "certificate: a plain transformer has one regime, so there are no curves over K: prefill is held to the steps"
    )
    return LevelResult(
        level=CERTIFICATE, target=case.target, checks=(check,), data=json_value(data), notes=(*coverage.notes, note)
    )


def _measured_reference(setup: ParitySetup, coverage: Coverage) -> Measurement:
    """PyTorch FP32's own regimes, measured once for all targets of a setup."""
    run = ReferenceRun(setup.reference, coverage.windows, coverage.length)
    key = ("certificate", coverage.passes[-1], coverage.windows, coverage.length)
    return setup.reference.once(key, lambda: measure(run, coverage, setup, "PyTorch FP32: certificate"))


def _extent(coverage: Coverage) -> dict[str, Any]:
    return {
        "unroll": coverage.unroll,
        "trained": coverage.trained,
        "window": coverage.length,
        "windows": coverage.windows,
        "passes": list(coverage.passes),
    }


def _curves(
    measured: Measurement, coverage: Coverage, reference: Measurement | None, perplexity_gap: float
) -> dict[str, Any]:
    handovers = handover_curves(measured, coverage, reference)
    stopping = stopping_bound(coverage.passes, measured.residual, measured.nll, measured.sequential_nll, perplexity_gap)
    return {
        "spans": span_curves(measured, coverage, reference, perplexity_gap),
        "positions": position_curves(measured, coverage),
        "residual": residual_curve(measured, coverage),
        "prefix": [float(error) for error in measured.prefix_error],
        "stopping": None if stopping is None else stopping.to_dict(),
        "handover": handovers[0],
        "handover_above": handovers[1] if len(handovers) > 1 else None,
    }


def _anchor_entries(errors: Mapping[tuple[str, int, int], Mapping[str, float]], limit: float) -> list[dict[str, Any]]:
    return [
        {
            "graph": graph,
            "tokens": tokens,
            "passes": passes,
            "error": float(np.max([*found.values()])),  # NaN if any is
            "limit": limit,
            "tensors": dict(found),
        }
        for (graph, tokens, passes), found in errors.items()
    ]


def _notes(coverage: Coverage, *, better: bool) -> list[str]:
    notes = []
    if not better:
        notes.append(
            "certificate: PyTorch FP32 predicts this text worse than a uniform guess would, so differences in "
            "likelihood are reported and not gated; states, caches and logits of the anchors are"
        )
    if coverage.trained is None:
        notes.append("certificate: the training length is not known, so all positions count as below it")
    elif coverage.trained > coverage.length:
        notes.append(
            f"certificate: windows of {coverage.length} tokens lie below the training length {coverage.trained}, so "
            "nothing is said about positions above it"
        )
    if coverage.selected != coverage.passes:
        listed = ", ".join(map(str, coverage.selected))
        notes.append(
            f"certificate: handovers are measured for K in {listed}; all other curves for every K up to "
            f"{coverage.passes[-1]}"
        )
    return notes


def _exactness_checks(
    run: TargetRun, anchors: Anchors, found: Measurement, coverage: Coverage, limits: Tolerance
) -> Iterator[Check]:
    """What holds by the equations, up to rounding, for every model."""
    precision = run.runner.target.profile.precision
    for (graph, tokens, passes), errors in anchors.errors.items():
        name = f"anchor: {passes} passes of {graph} over {tokens} tokens are {tokens} steps"
        yield _anchor_check(name, errors, graph, precision, limits)
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


def _anchor_check(name: str, errors: Mapping[str, float], graph: str, precision: str, limits: Tolerance) -> Check:
    """The worst of the errors by tensor against the limit of what is exact by the equations."""
    worst = max(errors, key=lambda tensor: _nan_last(errors[tensor]))
    where = f"in {worst} of {graph}"
    return measured("anchor_error", name, errors[worst], limit=limits.anchor_error, precision=precision, where=where)


def _regime_checks(
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
            excess = excess_interval(found, reference, coverage.passes.index(passes), span)
            name = f"regime gap beyond FP32's: K={passes}, positions {span.start}-{span.stop}"
            yield measured("gap_excess", name, excess.mean, interval=excess.ends, limit=limit, precision=precision)
    for place, continuation in enumerate(found.continuations):
        handover = continuation.handover
        excess = handover_excess(found, reference, place, coverage.selected.index(coverage.unroll))
        name = (
            f"handover beyond FP32's: K={coverage.unroll} over {handover.start} tokens, "
            f"steps {handover.start}-{handover.stop}"
        )
        limit = limits.handover_delta_nll if judged and handover.gated else None
        yield measured("handover_excess", name, excess.mean, interval=excess.ends, limit=limit, precision=precision)


def _reported_checks(data: Mapping[str, Any], coverage: Coverage) -> Iterator[Check]:
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
