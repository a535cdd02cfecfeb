"""L2: the step graph fed its own state and caches on real text, every output of every step against PyTorch FP32.

The tokens are the text's (teacher forcing), so that the reference and the target see the same history and any
difference is the target's own, accumulated through its state and caches. A few rows of windows run on one set of
buffers, are reset as a deployed session is, and run the next windows; after the last reset the first steps of the
first windows must repeat themselves bit by bit, so nothing can have outlived a reset. A second chain starts from the
hand-over of the prefill graph.

The error of a tensor at a step is its largest |difference| over the largest |value| that it takes in the reference
along the chain; for a cache it is that of the slot that the step wrote. ``next_token`` counts with the smallest logit
error that explains it, half of the reference's margin, over the largest |logit|. ``data``:

* ``windows`` (indices), ``steps``
* ``tensors``: per output ``largest``, ``step`` (where that was) and ``by_step`` (largest over windows, per step that
  ran; None where it is NaN or infinite)
* ``first_divergence``: None, or ``step``, ``window``, ``tensor``, ``error``, ``limit``
* ``handover``: None, or ``start`` (tokens in parallel passes), ``passes``, ``tensors`` and ``first_divergence`` of the
  second chain; its first step is ``start - 1``, what the prefill graph itself delivers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crt_export.errors import ContractError
from crt_export.ladder import CHAIN
from crt_export.parity.case import ParityCase, load_checked_graph
from crt_export.parity.chain_errors import ChainErrors, ChainText
from crt_export.parity.chain_run import ChainReference, TargetChain, tensor_order
from crt_export.parity.level import AT_LEAST, Check, LevelResult, ParitySetup, failed_check, gate_at_most
from crt_export.parity.trace import trace_tokens
from crt_export.spec import graph_names

#: Steps that are repeated after the last reset.
_REPEATED = 8
#: Above this the K-fold prefill graph takes gigabytes to load, which the corpus level does once already.
_HANDOVER_PARAMETERS = 20_000_000
_FIGURE = "largest error / largest |value|"


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """What is run: windows of the text, tokens of each, and how many of those go through parallel passes."""

    windows: tuple[int, ...]
    ids: np.ndarray
    start: int = 0
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What running a chain gave; ``problems`` are sentences on what no error covers."""

    errors: ChainErrors
    failed: str = ""
    cache_problems: tuple[str, ...] = ()
    reset_problem: str = ""


def check_chain(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Chain a target on a few windows.

    Args:
        case: The target.
        setup: Reference, windows, ``chain_windows`` and ``chain_steps``.

    Returns:
        A check that names the first divergence, one per tensor, and those of steps, caches, reset and hand-over.

    Raises:
        ContractError: The step graph differs from its contract or cannot be loaded.
    """
    chain, notes = _chosen(setup)
    tolerance = f"{case.precision}.chain_error"
    outcome = _run_texts(case, setup, chain)
    checks = [_divergence_check("first divergence", outcome, tolerance), _steps_check(outcome)]
    checks += [_tensor_check(name, outcome.errors, tolerance) for name in outcome.errors.to_dict()]
    checks += [_claim("caches", outcome.cache_problems, outcome.failed), _reset_check(outcome, tolerance)]
    data: dict[str, Any] = {"windows": list(chain.windows), **_curves(outcome), "handover": None}
    if setup.config.parameter_count > _HANDOVER_PARAMETERS:
        notes.append("chain: no hand-over from prefill, which takes K times the memory; the corpus level has it")
    elif chain.ids.shape[1] > 1:
        check, data["handover"] = _handover(case, setup, chain, tolerance)
        checks.append(check)
    return LevelResult(level=CHAIN, target=case.target, checks=tuple(checks), data=data, notes=tuple(notes))


def _chosen(setup: ParitySetup) -> tuple[_Chain, list[str]]:
    """Windows at even distances, and notes on what there was too little of."""
    windows, options, notes = setup.windows, setup.options, []
    count, steps = min(options.chain_windows, windows.count), min(options.chain_steps, windows.length)
    if count < options.chain_windows:
        notes.append(f"chain: {count} windows instead of {options.chain_windows}, all that the text has")
    if steps < options.chain_steps:
        notes.append(f"chain: {steps} steps instead of {options.chain_steps}, the length of a window")
    chosen = np.linspace(0, windows.count - 1, count).round().astype(int)
    ids = np.ascontiguousarray(windows.inputs[chosen, :steps])
    return _Chain(windows=tuple(chosen.tolist()), ids=ids), notes


def _run_texts(case: ParityCase, setup: ParitySetup, chain: _Chain) -> _Outcome:
    """Half of the windows at a time on the same buffers, with a reset between; one window alone runs twice."""
    rows = max(1, len(chain.windows) // 2)
    starts = [min(start, len(chain.windows) - rows) for start in range(0, len(chain.windows), rows)]
    starts = [0, 0] if len(chain.windows) == 1 else starts
    trace = trace_tokens(setup.reference, chain.ids)
    graph = load_checked_graph(case, "step", setup.config, setup.threads)
    reference = ChainReference(setup.model, trace, case.value_divisors(setup.config))
    target = TargetChain(case, reference, graph, rows)
    texts = [
        ChainText(window=chain.windows[start + row], after_reset=turn > 0)
        for turn, start in enumerate(starts)
        for row in range(rows)
    ]
    steps = range(chain.ids.shape[1])
    limit = setup.limits(case.precision).chain_error
    errors = ChainErrors(tensor_order(reference, setup.config.recurrent), texts, steps, limit)
    problems: list[str] = []
    try:
        for turn, start in enumerate(starts):
            target.reset()
            for position in steps:
                target.step(position, slice(start, start + rows), turn * rows, errors)
            problems += target.cache_problems([text.window for text in texts[turn * rows :]])
        reset_problem = _repeats(target, rows, len(steps))
    except ContractError as error:
        return _Outcome(errors=errors, failed=str(error), cache_problems=tuple(problems))
    return _Outcome(errors=errors, cache_problems=tuple(problems), reset_problem=reset_problem)


def _repeats(target: TargetChain, rows: int, steps: int) -> str:
    """Two fresh starts on the same text must agree bit by bit; what differs, or nothing."""
    runs = []
    for _ in range(2):
        target.reset()
        runs.append([target.outputs(position, slice(0, rows)) for position in range(min(_REPEATED, steps))])
    for step, (first, second) in enumerate(zip(*runs, strict=True)):
        for name, values in first.items():
            if not np.array_equal(values, second[name], equal_nan=True):
                return f"{name} of step {step} differs between two runs of the same text with a reset between"
    return ""


def _handover(case: ParityCase, setup: ParitySetup, chain: _Chain, tolerance: str) -> tuple[Check, dict | None]:
    """The first half of every window in K passes of the prefill graph, the rest in steps."""
    if "prefill" not in graph_names(setup.config):
        return Check(name="hand-over"), None
    start, count = chain.ids.shape[1] // 2, len(chain.windows)
    trace = trace_tokens(setup.reference, chain.ids, start=start, passes=case.unroll)
    reference = ChainReference(setup.model, trace, case.value_divisors(setup.config))
    steps = range(start - 1, chain.ids.shape[1])
    errors = ChainErrors(
        tensor_order(reference, setup.config.recurrent),
        [ChainText(window=window) for window in chain.windows],
        steps,
        setup.limits(case.precision).chain_error,
        first_graph="prefill",
    )
    outcome, everything = _Outcome(errors=errors), slice(0, count)
    try:
        graphs = {name: load_checked_graph(case, name, setup.config, setup.threads) for name in ("prefill", "step")}
        target = TargetChain(case, reference, graphs["step"], count)
        target.reset()
        target.prefill(graphs["prefill"], everything, 0, errors)
        for position in steps[1:]:
            target.step(position, everything, 0, errors)
        outcome = _Outcome(errors=errors, cache_problems=tuple(target.cache_problems(chain.windows)))
    except ContractError as error:
        outcome = _Outcome(errors=errors, failed=str(error))
    data = {"start": start, "passes": case.unroll, **_curves(outcome)}
    return _divergence_check("hand-over", outcome, tolerance), data


def _curves(outcome: _Outcome) -> dict[str, Any]:
    divergence = outcome.errors.first_divergence()
    return {
        "steps": int(outcome.errors.compared.all(axis=0).sum()),
        "tensors": outcome.errors.to_dict(),
        "first_divergence": divergence.to_dict() if divergence else None,
    }


def _divergence_check(name: str, outcome: _Outcome, tolerance: str) -> Check:
    """Holds where no tensor of any step is beyond the limit and every step ran."""
    errors, divergence = outcome.errors, outcome.errors.first_divergence()
    failures = [f"{divergence.sentence} ({tolerance})"] if divergence else []
    if name == "hand-over":
        failures += [*outcome.cache_problems, *([outcome.failed] if outcome.failed else [])]
    elif outcome.failed and not divergence:
        failures.append("the chain did not run to its end, so where it would have diverged is not known")
    return Check(
        name=name,
        figure=f"{_FIGURE}, any tensor",
        value=divergence.error if divergence else errors.worst(),
        limit=errors.limit,
        tolerance=tolerance,
        passed=not failures,
        failures=tuple(failures),
    )


def _steps_check(outcome: _Outcome) -> Check:
    """Every window took every step."""
    compared = outcome.errors.compared
    taken, asked = int(compared.sum(axis=1).min()), compared.shape[1]
    failures = (
        [f"{taken} of {asked} steps were compared in every window", outcome.failed]
        if taken < asked
        else [outcome.failed]
    )
    return Check(
        name="steps",
        figure="steps compared in every window",
        value=float(taken),
        limit=float(asked),
        relation=AT_LEAST,
        passed=taken == asked and not outcome.failed,
        failures=tuple(failure for failure in failures if failure),
    )


def _tensor_check(name: str, errors: ChainErrors, tolerance: str) -> Check:
    divergence = errors.first_divergence(name)
    where = f"({divergence.place} first)" if divergence else ""
    return gate_at_most(name, _FIGURE, errors.largest(name), errors.limit, tolerance, where=where)


def _reset_check(outcome: _Outcome, tolerance: str) -> Check:
    """Texts on buffers that held another one are as right, and the same text twice gives the same bits."""
    divergence = outcome.errors.first_divergence(after_reset=True)
    failures = [divergence.sentence] if divergence else []
    failures += [outcome.reset_problem] if outcome.reset_problem else []
    failures += ["not looked at, because the chain did not run to its end"] if outcome.failed else []
    return Check(
        name="reset",
        figure=f"{_FIGURE}, any tensor, after a reset",
        value=outcome.errors.worst(after_reset=True),
        limit=outcome.errors.limit,
        tolerance=tolerance,
        passed=not failures,
        failures=tuple(failures),
    )


def _claim(name: str, problems: Sequence[str], failed: str) -> Check:
    """Something that has no figure."""
    if problems:
        return failed_check(name, *problems)
    return (
        failed_check(name, "not looked at, because the chain did not run to its end")
        if failed
        else Check(name=name, passed=True)
    )
