"""Level L2: a target fed its own state and caches on real text, every output of every step against PyTorch FP32.

The tokens are the text's (teacher forcing), so that the reference and the target see the same history and any
difference is the target's own, accumulated through its state and caches. A few rows of windows run on one set of
buffers, are reset as a deployed session is, and run the next windows; after the last reset the first steps of the
first windows must repeat themselves bit by bit, so nothing can have outlived a reset. A second chain starts from the
hand-over of K parallel passes.

The error of a tensor at a step is its largest |difference| over the largest |value| that it takes in the reference
along the chain; for a cache it is that of the slot that the step wrote. ``next_token`` counts with the smallest logit
error that explains it, half of the reference's margin, over the largest |logit|. ``data``:

* ``windows`` (indices), ``steps``
* ``tensors``: per output ``largest``, ``step`` (where that was) and ``by_step`` (largest over windows, per step that
  ran; None where it is NaN or infinite)
* ``first_divergence``: None, or ``step``, ``window``, ``tensor``, ``error``, ``limit``
* ``handover``: None, or ``start`` (tokens in parallel passes), ``passes``, ``tensors`` and ``first_divergence`` of the
  second chain; its first step is ``start - 1``, what the passes themselves deliver
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from crt_export.errors import ContractError
from crt_export.parity.chain_errors import ChainErrors, ChainText
from crt_export.parity.chain_run import ChainReference, TargetChain, tensor_order
from crt_export.parity.levels import CHAIN
from crt_export.parity.metrics import Check, claim, measured
from crt_export.parity.report import LevelResult
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.trace import trace_tokens

#: Steps that are repeated after the last reset.
_REPEATED = 8
#: Above this a graph that makes K passes takes gigabytes to load, which the corpus level does once already.
_HANDOVER_PARAMETERS = 20_000_000


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
    runner = setup.runner(case)
    limit = setup.limits(case.precision).chain_error
    outcome = _run_texts(runner, case, setup, chain, limit)
    checks = [_divergence_check("first divergence", outcome, case.precision), _steps_check(outcome)]
    checks += [_tensor_check(name, outcome.errors, case.precision) for name in outcome.errors.to_dict()]
    checks.append(claim("caches", outcome.cache_problems or _not_looked_at(outcome)))
    checks.append(_reset_check(outcome, case.precision))
    data: dict[str, Any] = {"windows": list(chain.windows), **_curves(outcome), "handover": None}
    if setup.config.parameter_count > _HANDOVER_PARAMETERS and not runner.one_graph:
        notes.append("chain: no hand-over from prefill, which takes K times the memory; the corpus level has it")
    elif chain.ids.shape[1] > 1:
        check, data["handover"] = _handover(runner, case, setup, chain, limit)
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


def _run_texts(runner: Runner, case: ParityCase, setup: ParitySetup, chain: _Chain, limit: float) -> _Outcome:
    """Half of the windows at a time on the same buffers, with a reset between; one window alone runs twice."""
    rows = max(1, len(chain.windows) // 2)
    starts = [min(start, len(chain.windows) - rows) for start in range(0, len(chain.windows), rows)]
    starts = [0, 0] if len(chain.windows) == 1 else starts
    reference = ChainReference(setup.model, trace_tokens(setup.reference, chain.ids), case.value_divisors(setup.config))
    target = TargetChain(runner, reference, rows)
    texts = [
        ChainText(window=chain.windows[start + row], after_reset=turn > 0)
        for turn, start in enumerate(starts)
        for row in range(rows)
    ]
    steps, tensors = range(chain.ids.shape[1]), tensor_order(reference, setup.config.recurrent)
    errors = ChainErrors(tensors, texts, steps, limit, graph=runner.graph_name("step"))
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


def _handover(
    runner: Runner, case: ParityCase, setup: ParitySetup, chain: _Chain, limit: float
) -> tuple[Check, dict[str, Any]]:
    """The first half of every window in K passes, the rest in steps."""
    start, count = chain.ids.shape[1] // 2, len(chain.windows)
    trace = trace_tokens(setup.reference, chain.ids, start=start, passes=case.unroll)
    reference = ChainReference(setup.model, trace, case.value_divisors(setup.config))
    steps = range(start - 1, chain.ids.shape[1])
    errors = ChainErrors(
        tensor_order(reference, setup.config.recurrent),
        [ChainText(window=window) for window in chain.windows],
        steps,
        limit,
        graph=runner.graph_name("step"),
        first_graph=runner.graph_name("prefill"),
    )
    outcome, everything = _Outcome(errors=errors), slice(0, count)
    try:
        target = TargetChain(runner, reference, count)
        target.prefill(case.unroll, everything, 0, errors)
        for position in steps[1:]:
            target.step(position, everything, 0, errors)
        outcome = _Outcome(errors=errors, cache_problems=tuple(target.cache_problems(chain.windows)))
    except ContractError as error:
        outcome = _Outcome(errors=errors, failed=str(error))
    data = {"start": start, "passes": case.unroll, **_curves(outcome)}
    return _divergence_check("hand-over", outcome, case.precision), data


def _curves(outcome: _Outcome) -> dict[str, Any]:
    divergence = outcome.errors.first_divergence()
    return {
        "steps": int(outcome.errors.compared.all(axis=0).sum()),
        "tensors": outcome.errors.to_dict(),
        "first_divergence": divergence.to_dict() if divergence else None,
    }


def _divergence_check(name: str, outcome: _Outcome, precision: str) -> Check:
    """Holds where no tensor of any step is beyond the limit and every step ran."""
    errors, divergence = outcome.errors, outcome.errors.first_divergence()
    failures = [f"{divergence.sentence} ({precision}.chain_error)"] if divergence else []
    if name == "hand-over":
        failures += [*outcome.cache_problems, *([outcome.failed] if outcome.failed else [])]
    elif outcome.failed and not divergence:
        failures.append("the chain did not run to its end, so where it would have diverged is not known")
    value = divergence.error if divergence else errors.worst()
    return measured("chain_error", name, value, limit=errors.limit, precision=precision, failures=failures)


def _steps_check(outcome: _Outcome) -> Check:
    """Every window took every step."""
    compared = outcome.errors.compared
    taken, asked = int(compared.sum(axis=1).min()), compared.shape[1]
    failures = [f"{taken} of {asked} steps were compared in every window"] if taken < asked else []
    failures += [outcome.failed] if outcome.failed else []
    return measured("steps", "steps", float(taken), limit=float(asked), failures=failures)


def _tensor_check(name: str, errors: ChainErrors, precision: str) -> Check:
    divergence = errors.first_divergence(name)
    where = f"({divergence.place} first)" if divergence else ""
    return measured("chain_error", name, errors.largest(name), limit=errors.limit, precision=precision, where=where)


def _reset_check(outcome: _Outcome, precision: str) -> Check:
    """Texts on buffers that held another one are as right, and the same text twice gives the same bits."""
    divergence = outcome.errors.first_divergence(after_reset=True)
    failures = [divergence.sentence] if divergence else []
    failures += [*([outcome.reset_problem] if outcome.reset_problem else []), *_not_looked_at(outcome)]
    worst = outcome.errors.worst(after_reset=True)
    return measured("chain_error", "reset", worst, limit=outcome.errors.limit, precision=precision, failures=failures)


def _not_looked_at(outcome: _Outcome) -> list[str]:
    return ["not looked at, because the chain did not run to its end"] if outcome.failed else []
