"""L3: likelihood, divergence and agreement on a text, for every graph of every target, with confidence intervals.

Each regime of a target is compared with the same regime of PyTorch FP32; the gap between the regimes is a row of its
own. ``data`` of the level: see :class:`crt_export.parity.report.Comparison`, :mod:`crt_export.parity.comparison` and
:func:`check_text`; ``largest_fp16``: per graph, the largest |value| of the largest FP16 tensors.

Whether the text is one the model knows is a check of its own, of ``pytorch-fp32``: agreement on a text outside the
model's domain proves little. A bundle's own report records how well PyTorch FP32 predicted the text it was built on. If
the model had learnt that and now predicts worse than a uniform guess would, the text is not the model's: another
tokenizer, random bytes. What the tokens show of being text without asking any model
(:mod:`crt_export.quantize.text_evidence`) sharpens this: of tokens that look random or shuffled, half of what the
model knew of its own text is asked. Shuffled bytes keep their histogram, so a trained model may predict them better
than a uniform guess: the demo with 5.34 nat, its own text with 1.59 (512 tokens, ``validate/parity/test_corpus.py``),
where a uniform guess costs 5.55. Without such a record, as during a build, nothing is gated: untrained models are
exported too, and for them every text is as good as noise. It is noted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from crt_export.errors import ContractError
from crt_export.parity.comparison import RegimeGap, compare, reference_gaps, target_gaps
from crt_export.parity.half import compare_half
from crt_export.parity.headroom import OBSERVED, largest_fp16_values
from crt_export.parity.metrics import failed_check, measured
from crt_export.parity.reference import HANDOVER, PREFILL, PREFILL_PASS, STEP, first_position
from crt_export.parity.report import COMPILED, Comparison, LevelResult, corpus_result
from crt_export.parity.rollout import Rollout
from crt_export.parity.runner import Runner
from crt_export.parity.scores import Scorer, Scores
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.quantize.text_evidence import text_evidence

_REPORTED_TENSORS = 16
#: Tokens looked at without the model: enough for its statistics, and a fraction of a second.
_EVIDENCE_TOKENS = 16_384
_SHORTEST_WINDOW = 3  # that has neighbours to look at


def check_corpus(cases: Sequence[ParityCase], setup: ParitySetup) -> list[LevelResult]:
    """Run every regime of every target over all windows.

    Args:
        cases: The targets.
        setup: Reference, text and limits.
    """
    halves, notes = _halves(cases, setup)
    setup.progress("PyTorch FP32: regime gap", 0, setup.windows.count)
    gaps = {passes: reference_gaps(setup.reference, passes) for passes in sorted({case.unroll for case in cases})}
    results = [corpus_result("pytorch-half", halves, notes=notes)] if halves else []
    results += [_check_target(case, setup, gaps[case.unroll]) for case in cases]
    # A gap covers some positions, and has the steps as its reference: together those of the chain over whole windows.
    rows = [row for row, _ in next(iter(gaps.values()))]
    nll = sum((row.reference_nll or 0.0) * row.tokens for row in rows) / sum(row.tokens for row in rows)
    notes = _coverage_notes([row for result in results for row in result.comparisons], setup)
    results.append(check_text(setup, nll, [row for of_passes in gaps.values() for row, _ in of_passes], notes=notes))
    return results


def _halves(cases: Sequence[ParityCase], setup: ParitySetup) -> tuple[list[Comparison], list[str]]:
    """Real FP16 arithmetic: one per residual dtype of the half-precision targets, W8A8 on its own, and notes."""
    plain = dict.fromkeys(sorted({case.residual_dtype for case in cases if case.half}))
    quantized = {case.residual_dtype: case.plan for case in cases if case.plan is not None}
    halves, notes = [], []
    for residual_dtype, plan in (*plain.items(), *sorted(quantized.items())):
        half, found = compare_half(
            setup.checkpoint, setup.reference, residual_dtype, setup.tolerances, setup.progress, plan=plan
        )
        halves.append(half)
        notes += [note for note in found if note not in notes]
    return halves, notes


def _coverage_notes(rows: Sequence[Comparison], setup: ParitySetup) -> list[str]:
    """What the rows do not cover: the first half of the windows in the handover, likelihoods that gate nothing."""
    count, length = setup.windows.count, setup.windows.length
    notes = [
        f"handover rows score the second half of each window, from the last token of prefill on: "
        f"{count * (length - first_position(HANDOVER, length)):,} of {count * length:,} tokens"
    ]
    ungated = [row.reference_nll or 0.0 for row in rows if row.better_than_chance is False]
    if ungated:
        notes.append(
            f"delta nll is reported but not gated in {len(ungated)} rows, nor in their regime gaps: PyTorch FP32 "
            f"predicts this text worse than a uniform guess would (up to {max(ungated):.3f} nat per token), and there "
            "a rounding error shifts the mean to first order; logit errors and top-1 are gated"
        )
    return notes


# --- one target
def _check_target(case: ParityCase, setup: ParitySetup, gaps: Sequence[RegimeGap]) -> LevelResult:
    """Run every regime the target has; a regime that cannot run is a failed row.

    Where one graph makes steps and passes alike, ``prefill`` is K calls of it, and there is no ``prefill_pass`` beside.
    Engines that were compiled and cannot run here are listed, never passed.
    """
    row = Comparison(
        target=case.target,
        runtime="onnxruntime",
        graph="",
        precision=case.precision,
        regime="",
        arithmetic=case.arithmetic,
    )
    found: dict[str, Comparison] = {}
    scores: dict[str, Scores] = {}
    largest: dict[str, dict[str, float]] = {}
    try:
        runner = setup.runner(case)
    except ContractError as error:
        for regime in (STEP, PREFILL, HANDOVER):
            nothing = Scorer(setup.reference, regime, case.unroll).scores()
            named = dataclasses.replace(row, graph=regime, regime=regime, steps=_steps(case, setup, regime))
            found[regime] = compare(named, nothing, setup.tolerances, [str(error)])
    else:
        rollout = Rollout(runner, case, setup.windows, window_batch=setup.options.window_batch)
        separate = setup.config.carried.iterated and not runner.one_graph
        for regime in (STEP, PREFILL, *((PREFILL_PASS,) if separate else ()), HANDOVER):
            graph = _graphs(runner, regime)
            named = dataclasses.replace(row, graph=graph, regime=regime, steps=_steps(case, setup, regime))
            found[regime], measurements = _run_regime(rollout, named, setup)
            if measurements is not None:
                scores[regime] = measurements
        for name in OBSERVED if case.half else ():
            found[name], largest[name] = _with_headroom(found[name], name, rollout, setup)
    graphs = f"{found[PREFILL].graph},{found[STEP].graph}"
    compiled = [
        dataclasses.replace(
            row,
            runtime=case.runtime,
            graph=graph,
            regime=graph,
            label=f"{graph} ({COMPILED})",
            status=COMPILED,
            arithmetic=None,
        )
        for graph in case.compiled
    ]
    rows = [*found.values(), *target_gaps(case, graphs, scores, gaps, setup.tolerances), *compiled]
    data: dict[str, Any] = {"largest_fp16": largest} if largest else {}
    return corpus_result(case.target, rows, **data)


def _steps(case: ParityCase, setup: ParitySetup, regime: str) -> int:
    length = setup.windows.length
    return {STEP: length, HANDOVER: length - length // 2}.get(regime, case.unroll)


def _run_regime(rollout: Rollout, row: Comparison, setup: ParitySetup) -> tuple[Comparison, Scores | None]:
    """The row of one regime, and what was measured if it ran to its end."""
    tolerances, regime, count = setup.tolerances, row.regime, rollout.windows.count
    scorer = Scorer(setup.reference, regime, rollout.case.unroll, near_tie_margin=tolerances.near_tie_margin)
    label = f"{rollout.case.target}: {regime}"
    setup.progress(label, 0, count)
    try:
        rollout.run(regime, scorer, lambda done: setup.progress(label, done, count))
        problems = [*scorer.problems]
    except ContractError as error:
        problems = [*scorer.problems, str(error)]
    scores = scorer.scores()
    row = compare(row, scores, tolerances, problems)
    complete = bool(row.statistics) and not problems
    largest = rollout.inconsistency.get(regime)  # between two graphs of one computation; None where there is only one
    if largest is not None:
        limit, name = tolerances.precisions[row.precision].consistency, f"{row.label}: consistency"
        row = row.judged(measured("regime_consistency", name, largest, limit=limit, precision=row.precision))
    return row, scores if complete else None


def _graphs(runner: Runner, regime: str) -> str:
    """Graphs that a regime runs, in the order they run, joined with ``+``."""
    if regime == HANDOVER:
        return "+".join(dict.fromkeys((runner.graph_name(PREFILL), runner.graph_name(STEP))))
    return runner.graph_name(regime) + ("" if regime == STEP else "+head")


def _with_headroom(
    row: Comparison, name: str, rollout: Rollout, setup: ParitySetup
) -> tuple[Comparison, dict[str, float]]:
    """Observe one FP16 graph and let its row answer for it."""
    case = rollout.case
    setup.progress(f"{case.target}: FP16 values of {name}", 0, rollout.windows.count)
    if name not in case.graphs:
        return row, {}  # its row failed already, with that sentence
    check, batch, threads = f"{name}: fp16_headroom", rollout.batch, setup.threads
    try:
        values = largest_fp16_values(rollout.runner, case, name, rollout.windows, batch=batch, threads=threads)
    except ContractError as error:
        return row.judged(failed_check(check, f"FP16 values could not be observed: {error}")), {}
    tensor, largest = next(iter(values.items()))
    headroom = measured("fp16_headroom", check, largest, limit=setup.tolerances.fp16_headroom, tensor=tensor)
    return row.judged(headroom), dict(list(values.items())[:_REPORTED_TENSORS])


# --- the text
def check_text(
    setup: ParitySetup, nll: float, comparisons: Sequence[Comparison] = (), *, notes: Sequence[str] = ()
) -> LevelResult:
    """Judge the text by how well the reference predicts it.

    Args:
        setup: Windows, and the recorded likelihood if there is one.
        nll: Mean negative log-likelihood of the text under PyTorch FP32 token by token, nats.
        comparisons: What else the corpus level has of PyTorch FP32: its regime gap.
        notes: Of the level.

    Returns:
        One check, gated where a report was recorded of a model that had learnt its text. ``data``: ``regimes`` and
        ``text``: ``nll``, ``uniform_nll``, ``recorded_nll``, ``repetition`` and ``dependence`` (of noise 1 and 0), None
        where unknown.
    """
    tokens, vocab = setup.windows.inputs, setup.config.vocab_size
    uniform, recorded = math.log(vocab), setup.recorded_nll
    evidence, doubts, limit, failures = None, "", None, []
    if tokens.shape[1] >= _SHORTEST_WINDOW:
        evidence = text_evidence(tokens[: max(1, _EVIDENCE_TOKENS // tokens.shape[1])], vocab)
        doubts = "; ".join(evidence.problems)
    if recorded is not None and recorded <= setup.tolerances.learnt_share * uniform:
        limit = (recorded + uniform) / 2 if doubts else uniform
        if not nll < limit:
            looks = f", and it looks random or shuffled ({doubts})" if doubts else ""
            failures.append(
                f"this is not text the model knows: PyTorch FP32 predicts it with {nll:.3f} nat per token, expected "
                f"less than {limit:.3f}; a uniform guess costs {uniform:.3f} and the bundle's report records "
                f"{recorded:.3f}{looks}: validate on text like that which the model was trained on, encoded by its own "
                "tokenizer"
            )
    if doubts and not failures:
        doubtful = f"the validation text looks random or shuffled ({doubts}): its figures say little about real text"
        notes = (*notes, doubtful)
    text = {
        "nll": nll,
        "uniform_nll": uniform,
        "recorded_nll": recorded,
        "repetition": None if evidence is None else evidence.repetition,
        "dependence": None if evidence is None else evidence.dependence,
    }
    check = measured("text_nll", "text", nll, limit=limit, failures=failures)
    return corpus_result("pytorch-fp32", comparisons, check, notes=notes, text=text)
