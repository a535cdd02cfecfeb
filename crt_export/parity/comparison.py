"""Comparison of one regime with PyTorch FP32: scores become figures, figures become checks.

Metrics in nats (``Metric.nats``) gate only where the reference predicts the text better than a uniform guess would:
they are costs that grow with the scale of the logits, and the logits of a model that does not fit the text have no
scale of their own. Elsewhere they are reported. The others are shares, or relative to the spread of the logits, and
judge every model.

The regime gap is how far K parallel passes are from the exact recurrence, in PyTorch FP32 and in every target. The gap
of the reference belongs to the model and gates nothing. A target is judged by how much larger its own gap is, on
positions below the length the model was trained at; above that it is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.parity.corpus_statistics import Figure, corpus_figures, corpus_statistics
from crt_export.parity.metrics import METRICS, Check, measured
from crt_export.parity.reference import PREFILL, STEP, Reference
from crt_export.parity.report import GAP, Comparison
from crt_export.parity.scores import TOP, Scores, reference_nll
from crt_export.parity.setup import ParityCase
from crt_export.parity.statistics import paired_interval
from crt_export.parity.tolerances import Tolerances


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
    figures = corpus_figures(scores, tolerances.near_tie_margin)
    return row.judged(*_checks(row, figures, tolerances, vocab=scores.vocab))


def _checks(row: Comparison, figures: dict[str, Figure], tolerances: Tolerances, *, vocab: int) -> Iterator[Check]:
    limits = tolerances.precisions[row.precision]
    for key, (value, interval) in figures.items():
        metric = METRICS[key]
        reported = metric.nats and not row.better_than_chance
        if key == "top10_overlap" and vocab <= TOP:
            reported = True  # all tokens there are: the overlap is 1 whatever the target says
        limit, failures = None if reported else getattr(limits, metric.limit), None
        if value is None:
            margin = tolerances.near_tie_margin
            failures = [f"top-1 was not compared: no token has a margin above {margin:g} in the reference"]
        yield measured(
            key,
            f"{row.label}: {key}",
            value,
            interval=interval,
            limit=limit,
            precision="" if limit is None else row.precision,
            failures=failures,
            tokens=row.top1_tokens,
        )


# --- the regime gap
@dataclass(frozen=True, kw_only=True, eq=False)
class RegimeGap:
    """The gap on some positions of the windows, not gated, and the paired differences it stands on."""

    comparison: Comparison
    differences: np.ndarray


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
    return [regime_gap(row, step, prefill, positions) for positions in ranges]


def trained_ranges(length: int, trained: int | None) -> list[slice]:
    """Positions of a window below and above the training length; all of them where it is not known."""
    if trained is None or trained >= length:
        return [slice(0, length)]
    return [slice(0, trained), slice(trained, length)]


def regime_gap(row: Comparison, sequential: np.ndarray, parallel: np.ndarray, positions: slice) -> RegimeGap:
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
        regime=GAP,
        label=label,
        tokens=gap.size,
        positions=(positions.start, positions.stop),
        nll=float(parallel.mean()),
        reference_nll=float(sequential.mean()),
    ).judged(measured("delta_nll", f"{label}: delta_nll", interval.mean, interval=interval.ends))
    return RegimeGap(comparison=row, differences=gap)


def target_gaps(
    case: ParityCase,
    graph: str,
    measurements: Mapping[str, Scores],
    references: Sequence[RegimeGap],
    tolerances: Tolerances,
    trained: int | None,
) -> list[Comparison]:
    """The gap of one target per range of positions, judged against that of PyTorch FP32.

    Args:
        case: The target.
        graph: Graphs that made its K passes and its steps.
        measurements: What was measured, per regime that ran to its end; without steps or K passes there is no gap, and
            their regime failed already.
        references: The model's own gaps.
        tolerances: The limits.
        trained: Length the model was trained at; None where it is not known.
    """
    if STEP not in measurements or PREFILL not in measurements:
        return []
    step, prefill = measurements[STEP], measurements[PREFILL]
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
    for reference in references:
        first, last = reference.comparison.positions or (0, 0)
        own = regime_gap(row, step.nll, prefill.nll, slice(first, last))
        gated = step.better_than_chance and (trained is None or last <= trained)
        comparisons.append(judge_gap(own, reference.differences, limit if gated else None))
    return comparisons


def judge_gap(own: RegimeGap, reference: np.ndarray, limit: float | None) -> Comparison:
    """Judge a target's regime gap against FP32's own, paired; None as limit only reports."""
    excess, row = paired_interval(own.differences - reference), own.comparison
    name, precision = f"{row.label}: gap_delta_nll", "" if limit is None else row.precision
    return row.judged(
        measured("gap_delta_nll", name, excess.mean, interval=excess.ends, limit=limit, precision=precision)
    )
