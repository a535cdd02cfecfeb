"""Level L1: one call from the reference's own state: is every output tensor right?

Each graph is called with inputs that PyTorch FP32 made: at the start of a text and in its middle, rows at different
positions in one call, chunks padded on the right, a row with nothing but padding, a first iterate of zeros and one that
is wrong. It is called as a session does: on a CPU ``step`` is a pass over one token, and ``prefill`` K passes, of one
graph. Every output is compared: caches slot by slot, with the past as it was and nothing beyond what was written.

The error of a tensor is its largest |difference| over the largest |value| that the reference has in it; of
``residual``, which is a difference of hidden states, over the largest |value| of ``next_hidden``. ``next_token`` must
be the argmax of the target's own logits and may differ from the reference's only where the reference is near a tie.

``data`` of the result::

    positions   tokens in the cache before the calls
    tensors     per graph and output: max_abs, mean_abs, relative (the error above), limit; integers have none of these

Outputs of both sides are saved for Polygraphy's tools, see :mod:`crt_export.parity.difference`; saved caches
stop at the last slot written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crt_export.errors import ContractError, UnsupportedError
from crt_export.parity.difference import difference, save_outputs
from crt_export.parity.interchange import interchange_checks, session_outputs
from crt_export.parity.levels import ONE_STEP
from crt_export.parity.metrics import METRICS, Check, claim, failed_check, measured
from crt_export.parity.one_step_calls import Call, OneStepCalls
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.spec import GraphSpec, graph_names

Array = NDArray[Any]

REFERENCE_RUN = "pytorch-fp32"
_CACHE, _POSITION = "present_key_values.", "next_position"


def check_one_step(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Call every graph of a target from the reference's own inputs and compare every output.

    Args:
        case: The target.
        setup: Reference, text, limits, and where to save the outputs.

    Returns:
        One check per graph and output, and those of :mod:`crt_export.parity.interchange`; a graph that cannot run is
        one failed check.

    Raises:
        ContractError: What a session loads cannot be loaded or breaks the contract.
        MissingDependencyError: ONNX Runtime is not installed, or Polygraphy where outputs are saved.
    """
    runner = setup.runner(case)
    calls = OneStepCalls(case, setup)
    checks: list[Check] = []
    tensors: dict[str, Any] = {}
    for name in graph_names(setup.config.carried):
        comparison = _Comparison(case, setup, name)
        try:
            for call in calls.of(name):
                comparison.add(session_outputs(runner, name, call.inputs), call, calls.capacity)
        except (ContractError, UnsupportedError) as error:
            checks.append(failed_check(f"{name}: runs", str(error)))
        checks += comparison.checks()
        tensors[name] = comparison.data()
        if setup.saved_outputs is not None and comparison.outputs:
            runs = {case.target: comparison.outputs, REFERENCE_RUN: comparison.references}
            save_outputs(setup.saved_outputs / case.target / f"{name}.json", runs)
    checks += interchange_checks(runner, setup, calls)
    return LevelResult(
        level=ONE_STEP,
        target=case.target,
        checks=tuple(checks),
        data={"positions": calls.positions, "tensors": tensors},
    )


@dataclass
class _Tensor:
    """What was found about one output over all calls."""

    max_abs: float = 0.0
    mean_abs: float = 0.0
    relative: float = 0.0
    failures: list[str] = field(default_factory=list)


class _Comparison:
    """All calls of one graph."""

    def __init__(self, case: ParityCase, setup: ParitySetup, name: str) -> None:
        self.name = name
        self._spec: GraphSpec = case.spec(name, setup.config)
        self._limit = setup.limits(case.precision).tensor_error
        self._precision = case.precision
        self._near_tie = setup.tolerances.near_tie_margin
        self._found: dict[str, _Tensor] = {}
        self.outputs: list[dict[str, Array]] = []
        self.references: list[dict[str, Array]] = []

    def add(self, whole: Mapping[str, Array], call: Call, capacity: int) -> None:
        """Compare the outputs of one call."""
        sizes = {"batch": len(call.rows), "capacity": capacity}
        sizes["seq"] = next((v.shape[1] for k, v in call.inputs.items() if k in ("input_ids", "hidden")), 1)
        found = self._comparable(whole, call, sizes)
        expected = {name: call.expected[name] for name in found}
        self.outputs.append(found)
        self.references.append(expected)
        for name, values in found.items():
            if values.dtype.kind == "f":
                self._compare(name, values, expected[name], call)
            if name.startswith(_CACHE):
                self._compare_slots(name, whole[name], call)
        if _POSITION in found:
            positions, wanted = found[_POSITION], expected[_POSITION]
            for row in np.flatnonzero(positions != wanted)[:1]:
                self._fail(_POSITION, f"is {positions[row]}, expected {wanted[row]}", call, row)
        if {"next_token", "logits"} <= found.keys():
            self._compare_tokens(found["next_token"][:, 0], found["logits"], expected["logits"], call)

    def checks(self) -> Iterator[Check]:
        """One per output that was compared."""
        for spec in self._spec.outputs:
            found, name = self._found.get(spec.name), f"{self.name}: {spec.name}"
            if found is None:
                continue
            if spec.dtype == "int64":
                yield claim(name, found.failures)
                continue
            error, limit, failures = found.relative, self._limit, found.failures
            yield measured("tensor_error", name, error, limit=limit, precision=self._precision, failures=failures)

    def data(self) -> dict[str, dict[str, float]]:
        """Per float output its figures."""
        floats = [spec.name for spec in self._spec.outputs if spec.dtype != "int64" and spec.name in self._found]
        keys = ("max_abs", "mean_abs", "relative")
        return {
            name: {**{key: getattr(self._found[name], key) for key in keys}, "limit": self._limit} for name in floats
        }

    def _tensor(self, name: str) -> _Tensor:
        return self._found.setdefault(name, _Tensor())

    def _fail(self, name: str, sentence: str, call: Call, row: int) -> None:
        self._tensor(name).failures.append(f"{sentence} ({call.rows[row]}; {call.name})")

    def _comparable(self, whole: Mapping[str, Array], call: Call, sizes: Mapping[str, int]) -> dict[str, Array]:
        """The outputs that can be compared at all, caches up to the last slot written; the others fail."""
        comparable = {}
        for spec in self._spec.outputs:
            found, tensor, problem = whole.get(spec.name), self._tensor(spec.name), ""
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims)
            if found is None:
                problem = f"{self.name} delivers no {spec.name}"
            elif found.dtype != np.dtype(spec.dtype) or found.shape != shape or not found.size:
                problem = (
                    f"{self.name}: {spec.name} is {found.dtype} {list(found.shape)}, "
                    f"expected {spec.dtype} {list(shape)} ({call.name})"
                )
            elif found.dtype.kind == "f" and not np.isfinite(found).all():
                row = int(np.argwhere(~np.isfinite(found))[0][0])
                problem = f"{self.name}: {spec.name} is NaN or infinite at {call.rows[row]} ({call.name})"
            else:
                used = found[:, :, : call.slots] if spec.name.startswith(_CACHE) else found
                comparable[spec.name] = np.ascontiguousarray(used)
            if problem:
                tensor.failures.append(problem)
                tensor.relative = float("nan")
        return comparable

    def _compare(self, name: str, found: Array, expected: Array, call: Call) -> None:
        # A residual is a difference of hidden states and is off as they are.
        scale = float(np.abs(call.expected["next_hidden" if name == "residual" else name]).max())
        tensor, error = self._tensor(name), difference(found, expected, self._limit * scale)
        relative = error.largest / scale if scale else float(error.largest > 0)
        for key, value in (("max_abs", error.largest), ("mean_abs", error.mean), ("relative", relative)):
            setattr(tensor, key, float(np.maximum(getattr(tensor, key), value)))  # maximum, unlike max, keeps NaN
        if not error.passed:
            off = np.abs(found.astype(np.float64) - expected)
            place = tuple(int(index) for index in np.unravel_index(int(off.argmax()), off.shape))
            tensor.failures.append(
                f"{METRICS['tensor_error'].figure} is {relative:.3g}, expected at most {self._limit:g} "
                f"({self._precision}.tensor_error); at {list(place)} "
                f"expected {expected[place]:.6g}, found {found[place]:.6g} ({call.rows[place[0]]}; {call.name})"
            )

    def _compare_tokens(self, tokens: Array, own: Array, expected: Array, call: Call) -> None:
        """Each is the argmax of the graph's own logits, and the reference's but for near ties."""
        allowed = max(self._near_tie, 2 * self._limit * float(np.abs(expected).max()))
        for row, token in enumerate(tokens):
            if not 0 <= token < own.shape[1] or own[row, token] != own[row].max():
                sentence = f"is {token}, the argmax of the graph's own logits is {own[row].argmax()}"
                self._fail("next_token", sentence, call, row)
                continue
            margin = float(expected[row].max() - expected[row, token])
            if margin > allowed:
                sentence = (
                    f"is {token}, expected {expected[row].argmax()}, whose logit is {margin:.3g} larger in the "
                    f"reference: no near tie, which ends at {allowed:.3g}"
                )
                self._fail("next_token", sentence, call, row)

    def _compare_slots(self, name: str, cache: Array, call: Call) -> None:
        """The past is as it was given, and what was not written is zero."""
        past = call.inputs[name.replace("present", "past")]
        for row, (start, stop) in enumerate(call.written):
            if not np.array_equal(cache[row, :, :start], past[row, :, :start]):
                self._fail(name, f"slots before {start} were changed", call, row)
            touched = np.flatnonzero(cache[row, :, stop:].any(axis=(0, 2)))
            if len(touched):
                sentence = f"slot {stop + touched[0]} is not zero, slots from {stop} on are unused"
                self._fail(name, sentence, call, row)
