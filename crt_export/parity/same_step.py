"""One token is one pass over a chunk of one: the step graph and a pass of one token must give the same.

Both are forms of the same function of the same target, so what quantisation costs against PyTorch cancels: a mask, a
position or a rotation that is wrong in one of them shows far below the limits that INT8 needs elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crt_export.config import ModelConfig
from crt_export.engine.onnxruntime import OrtGraph
from crt_export.errors import ContractError
from crt_export.parity.case import ParityCase
from crt_export.parity.level import Check, ParitySetup, gate_at_most
from crt_export.parity.one_step_calls import Call, OneStepCalls
from crt_export.parity.reference import PREFILL, PREFILL_PASS, STEP

Arrays = Mapping[str, NDArray[Any]]

_FIGURE = "largest |difference| / largest |value|"


def compared_graphs(config: ModelConfig) -> tuple[str, str]:
    """The step graph, and the one that makes a pass: ``prefill_pass``, or a plain transformer's ``prefill``."""
    return STEP, PREFILL_PASS if config.recurrent else PREFILL


def same_step_check(
    case: ParityCase, setup: ParitySetup, calls: OneStepCalls, graphs: Mapping[str, OrtGraph]
) -> Check | None:
    """Call the step graph and a pass over the same token and compare logits, state and caches.

    Args:
        case: The target.
        setup: Configuration and limits; ``consistency`` is the limit.
        calls: The calls of the step graph.
        graphs: Those of :func:`compared_graphs` that could be loaded.

    Returns:
        One check; None where a graph cannot run, which has failed another check already.
    """
    names = compared_graphs(setup.config)
    if not graphs.keys() >= set(names):
        return None
    (step, one_pass), other = (graphs[name] for name in names), names[1]
    largest, place = 0.0, ""
    try:
        for call in calls.of(STEP):
            taken = {spec.name for spec in one_pass.inputs}
            found = one_pass.run({name: value for name, value in _inputs(call, setup).items() if name in taken})
            expected = step.run({spec.name: call.inputs[spec.name] for spec in step.inputs})
            for name, values in expected.items():
                if values.dtype.kind != "f":
                    continue
                error = _error(found[name], values)
                if place == "" or not error <= largest:  # NaN is larger than any
                    largest, place = error, f"in {name} ({call.name})"
    except ContractError:
        return None
    return gate_at_most(
        f"{STEP} against {other} of one token",
        _FIGURE,
        largest,
        setup.limits(case.precision).consistency,
        f"{case.precision}.consistency",
        where=place,
    )


def _inputs(call: Call, setup: ParitySetup) -> dict[str, NDArray[Any]]:
    """Those of a step, and what a chunk has besides."""
    rows = len(call.rows)
    hidden = np.zeros((rows, 1, setup.config.hidden_size), np.float32)
    return {**call.inputs, "length": np.ones(rows, np.int64), "hidden": hidden}


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(found.astype(np.float64) - expected)
        return float(difference.max() / max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny)))
