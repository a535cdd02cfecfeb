"""Level L2: a target fed its own state and caches on real text, every output of every step against PyTorch FP32.

The tokens are the text's (teacher forcing), so that the reference and the target see the same history and any
difference is the target's own, accumulated through its state and caches. A few rows of windows run on one set of
buffers, are reset as a deployed session is, and run the next windows; after the last reset the first steps of the
first windows must repeat themselves bit by bit, so nothing can have outlived a reset. A second chain starts from the
handover of K parallel passes.

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crt_export.errors import ContractError
from crt_export.parity.chain_errors import ChainErrors, ChainReference, row_errors, token_errors, token_problem
from crt_export.parity.levels import CHAIN
from crt_export.parity.metrics import Check, claim, measured
from crt_export.parity.report import LevelResult
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParityCase, ParitySetup

#: Steps that are repeated after the last reset.
_REPEATED = 8
#: Slots beyond the last token where the capacity is ours to choose: something that must stay zero.
_SPARE_SLOTS = 8
#: Above this a graph that makes K passes takes gigabytes to load, which the corpus level does once already.
_HANDOVER_PARAMETERS = 20_000_000


@dataclass(kw_only=True)
class _Outcome:
    """What running a chain gave, and sentences on what no error covers."""

    errors: ChainErrors
    failed: list[str] = field(default_factory=list)
    cache_problems: list[str] = field(default_factory=list)
    reset_problems: list[str] = field(default_factory=list)

    @property
    def unknown(self) -> list[str]:
        """What to say of a claim that needed the whole chain."""
        return ["not looked at, because the chain did not run to its end"] if self.failed else []


def check_chain(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Chain a target on a few windows.

    Args:
        case: The target.
        setup: Reference, windows, ``chain_windows`` and ``chain_steps``.

    Returns:
        A check that names the first divergence, one per tensor, and those of steps, caches, reset and handover.

    Raises:
        ContractError: The step graph differs from its contract or cannot be loaded.
    """
    windows, ids, notes = _chosen(setup)
    runner = setup.runner(case)
    outcome = _run_texts(runner, case, setup, windows, ids)
    unfinished = ["the chain did not run to its end, so where it would have diverged is not known"]
    first = outcome.errors.first_divergence()
    checks = [
        _divergence_check("first divergence", outcome, case, unfinished if outcome.failed and not first else []),
        _steps_check(outcome),
        *(_tensor_check(name, outcome.errors, case.precision) for name in outcome.errors.to_dict()),
        claim("caches", outcome.cache_problems or outcome.unknown),
        _reset_check(outcome, case.precision),
    ]
    data: dict[str, Any] = {"windows": list(windows), **_curves(outcome), "handover": None}
    if setup.config.parameter_count > _HANDOVER_PARAMETERS and not runner.one_graph:
        notes.append("chain: no handover from prefill, which takes K times the memory; the corpus level has it")
    elif ids.shape[1] > 1:
        start = ids.shape[1] // 2
        outcome = _run_handover(runner, case, setup, windows, ids, start)
        data["handover"] = {"start": start, "passes": case.unroll, **_curves(outcome)}
        checks.append(_divergence_check("handover", outcome, case, [*outcome.cache_problems, *outcome.failed]))
    return LevelResult(level=CHAIN, target=case.target, checks=tuple(checks), data=data, notes=tuple(notes))


def _chosen(setup: ParitySetup) -> tuple[list[int], np.ndarray, list[str]]:
    """Windows at even distances, their tokens, int64 [windows, steps], and notes on what there was too little of."""
    windows, options, notes = setup.windows, setup.options, []
    count, steps = min(options.chain_windows, windows.count), min(options.chain_steps, windows.length)
    if count < options.chain_windows:
        notes.append(f"chain: {count} windows instead of {options.chain_windows}, all that the text has")
    if steps < options.chain_steps:
        notes.append(f"chain: {steps} steps instead of {options.chain_steps}, the length of a window")
    chosen = np.linspace(0, windows.count - 1, count).round().astype(int)
    return chosen.tolist(), np.ascontiguousarray(windows.inputs[chosen, :steps]), notes


def _run_texts(
    runner: Runner, case: ParityCase, setup: ParitySetup, windows: Sequence[int], ids: np.ndarray
) -> _Outcome:
    """Half of the windows at a time on the same buffers, with a reset between; one window alone runs twice."""
    rows, steps = max(1, len(windows) // 2), range(ids.shape[1])
    starts = [min(start, len(windows) - rows) for start in range(0, len(windows), rows)]
    starts = [0, 0] if len(windows) == 1 else starts
    texts = [windows[start + row] for start in starts for row in range(rows)]
    reference = ChainReference(setup.model, setup.reference.trace(ids), case.value_divisors(setup.config))
    limit, graph = setup.limits(case.precision).chain_error, runner.graph_name("step")
    outcome = _Outcome(
        errors=ChainErrors(reference.tensors, texts, steps, limit, fresh=rows, graphs=(graph, graph)),
    )
    target = TargetChain(runner, reference, outcome.errors, rows)
    try:
        for turn, start in enumerate(starts):
            target.reset()
            for position in steps:
                target.step(position, slice(start, start + rows), turn * rows)
            outcome.cache_problems += target.cache_problems(texts[turn * rows :])
        outcome.reset_problems += _repeats(target, rows, len(steps))
    except ContractError as error:
        outcome.failed.append(str(error))
    return outcome


def _repeats(target: TargetChain, rows: int, steps: int) -> list[str]:
    """Two fresh starts on the same text must agree bit by bit; the first that differs."""
    runs = []
    for _ in range(2):
        target.reset()
        runs.append([target.outputs(position, slice(0, rows)) for position in range(min(_REPEATED, steps))])
    for step, (first, second) in enumerate(zip(*runs, strict=True)):
        for name, values in first.items():
            if not np.array_equal(values, second[name], equal_nan=True):
                return [f"{name} of step {step} differs between two runs of the same text with a reset between"]
    return []


def _run_handover(
    runner: Runner, case: ParityCase, setup: ParitySetup, windows: Sequence[int], ids: np.ndarray, start: int
) -> _Outcome:
    """The first tokens of every window in K passes, the rest in steps."""
    trace = setup.reference.trace(ids, start=start, passes=case.unroll)
    reference = ChainReference(setup.model, trace, case.value_divisors(setup.config))
    steps, limit = range(start - 1, ids.shape[1]), setup.limits(case.precision).chain_error
    graphs = (runner.graph_name("prefill"), runner.graph_name("step"))
    outcome = _Outcome(errors=ChainErrors(reference.tensors, windows, steps, limit, graphs=graphs))
    everything = slice(0, len(windows))
    try:
        target = TargetChain(runner, reference, outcome.errors, len(windows))
        target.prefill(case.unroll, everything)
        for position in steps[1:]:
            target.step(position, everything, 0)
        outcome.cache_problems += target.cache_problems(windows)
    except ContractError as error:
        outcome.failed.append(str(error))
    return outcome


def _curves(outcome: _Outcome) -> dict[str, Any]:
    divergence = outcome.errors.first_divergence()
    return {
        "steps": int(outcome.errors.compared.all(axis=0).sum()),
        "tensors": outcome.errors.to_dict(),
        "first_divergence": divergence.to_dict() if divergence else None,
    }


def _divergence_check(name: str, outcome: _Outcome, case: ParityCase, problems: Sequence[str]) -> Check:
    """Holds where no tensor of any step is beyond the limit and there are no problems either."""
    errors, divergence = outcome.errors, outcome.errors.first_divergence()
    failures = [f"{divergence.sentence} ({case.precision}.chain_error)"] if divergence else []
    value = divergence.error if divergence else errors.largest()
    failures += problems
    return measured("chain_error", name, value, limit=errors.limit, precision=case.precision, failures=failures)


def _steps_check(outcome: _Outcome) -> Check:
    """Every window took every step."""
    compared = outcome.errors.compared
    taken, asked = int(compared.sum(axis=1).min()), compared.shape[1]
    failures = [f"{taken} of {asked} steps were compared in every window"] if taken < asked else []
    return measured("steps", "steps", float(taken), limit=float(asked), failures=[*failures, *outcome.failed])


def _tensor_check(name: str, errors: ChainErrors, precision: str) -> Check:
    divergence = errors.first_divergence(name)
    where = f"({divergence.place} first)" if divergence else ""
    return measured("chain_error", name, errors.largest(name), limit=errors.limit, precision=precision, where=where)


def _reset_check(outcome: _Outcome, precision: str) -> Check:
    """Texts on buffers that held another one are as right, and the same text twice gives the same bits."""
    errors, divergence = outcome.errors, outcome.errors.first_divergence(after_reset=True)
    failures = [*([divergence.sentence] if divergence else []), *outcome.reset_problems, *outcome.unknown]
    worst = errors.largest(after_reset=True)
    return measured("chain_error", "reset", worst, limit=errors.limit, precision=precision, failures=failures)


class TargetChain:
    """One target on the buffers of a few rows, which it keeps from text to text as a deployed session does."""

    def __init__(self, runner: Runner, reference: ChainReference, errors: ChainErrors, rows: int) -> None:
        """Allocate.

        Args:
            runner: The target.
            reference: What it is compared with.
            errors: Takes the results.
            rows: Texts per call.
        """
        self._reference, self._errors = reference, errors
        self._decoding = runner.decoding(rows, reference.trace.ids.shape[1] + _SPARE_SLOTS)
        self._written: dict[str, np.ndarray] = {}

    def reset(self) -> None:
        """Forget everything, as a session does before another text."""
        self._decoding.reset()
        self._written = {}

    def prefill(self, passes: int, texts: slice) -> None:
        """Take the first tokens of some texts in K passes and compare what decoding goes on from.

        Raises:
            ContractError: The graph failed.
        """
        start = self._reference.trace.start
        self._decoding.prefill(self._reference.trace.ids[texts, :start], passes)
        self._compare(texts, texts.start, slice(0, start))

    def step(self, position: int, texts: slice, first: int) -> None:
        """Feed one token of some texts and compare every output.

        Args:
            position: Tokens before it.
            texts: Which texts of the trace.
            first: Their index among the texts of the errors.

        Raises:
            ContractError: The graph failed.
        """
        self._decoding.step(self._reference.trace.ids[texts, position])
        self._compare(texts, first, slice(position, position + 1))

    def outputs(self, position: int, texts: slice) -> dict[str, np.ndarray]:
        """Feed one token of some texts and copy what it gives."""
        self._decoding.step(self._reference.trace.ids[texts, position])
        found = {name: self._decoding.output(name) for name in (*self._reference.states, "logits")}
        return {name: np.array(values) for name, values in found.items() if values is not None}

    def cache_problems(self, windows: Sequence[int]) -> list[str]:
        """What was written to a cache after its step, or beyond the last token; ``windows`` names the rows."""
        end, problems = self._reference.trace.ids.shape[1], []
        for name, written in self._written.items():
            cache = self._output(name)
            changed = np.any((cache != written) & ~(np.isnan(cache) & np.isnan(written)), axis=(1, 3))
            for first, part, what in (
                (0, changed[:, :end], "was written to again after its own step"),
                (end, changed[:, end:], f"is not zero, though only {end} tokens were fed"),
            ):
                if part.any():
                    row, slot = (int(index) for index in np.argwhere(part)[0])
                    problems.append(f"{name} of window {windows[row]}: slot {first + slot} {what}")
        return problems

    def _compare(self, texts: slice, first: int, slots: slice) -> None:
        reference, step, found = self._reference, slots.stop - 1, {}
        for name, expected in reference.caches.items():
            cache = self._output(name)
            new = cache[:, :, slots]
            self._written.setdefault(name, np.zeros_like(cache))[:, :, slots] = new
            new = new.astype(np.float32) * reference.factors.get(name, np.float32(1))
            found[name] = row_errors(new, expected[texts, :, slots], reference.scales[name])
        for name, states in reference.states.items():
            found[name] = row_errors(self._output(name), states[texts, step : step + 1], reference.scales[name])
        logits, expected, scale = self._output("logits"), reference.logits(texts, step), reference.scales["logits"]
        tokens, positions = self._output("next_token")[:, 0], self._output("next_position")
        found["logits"] = row_errors(logits, expected, scale)
        found["next_token"] = token_errors(tokens, logits, expected, scale)
        found["next_position"] = np.abs(positions - (step + 1)).astype(np.float64)
        details = {
            "next_token": [*map(token_problem, tokens, logits, expected)],
            "next_position": ["" if at == step + 1 else f"is {at}, expected {step + 1}" for at in positions],
        }
        self._errors.add(first, step, found, details)

    def _output(self, name: str) -> np.ndarray:
        values = self._decoding.output(name)
        assert values is not None  # every graph of the contract has it
        return values
