"""A quantisation plan as one file of arrays and a few JSON values, bit for bit what was planned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from crt_export.quantize.plan import QuantizedInput, QuantizedLinear, W8A8Options, W8A8Plan

_INPUTS, _LINEARS, _NORMS, _FACTORS = "inputs", "linears", "norms", "factors"


def write_plan(plan: W8A8Plan, path: Path) -> dict[str, Any]:
    """Write the arrays; return the rest, ready for JSON."""
    save_file(_arrays(plan), path)
    return _rest(plan)


def plan_digest(plan: W8A8Plan) -> str:
    """SHA-256 over everything that a plan says."""
    total = hashlib.sha256(json.dumps(_rest(plan), sort_keys=True).encode())
    for name, array in sorted(_arrays(plan).items()):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def _arrays(plan: W8A8Plan) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, given in plan.inputs.items():
        arrays[f"{_INPUTS}/{name}"] = np.array([given.scale, given.shift], np.float32)
    for name, linear in plan.linears.items():
        arrays[f"{_LINEARS}/{name}/weight"], arrays[f"{_LINEARS}/{name}/scale"] = linear.weight, linear.weight_scale
        if linear.bias is not None:
            arrays[f"{_LINEARS}/{name}/bias"] = linear.bias
    arrays |= {f"{_NORMS}/{name}": values for name, values in plan.norms.items()}
    arrays |= {f"{_FACTORS}/{name}": values for name, values in plan.factors.items()}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _rest(plan: W8A8Plan) -> dict[str, Any]:
    return {
        "options": plan.options.to_dict(),
        _INPUTS: list(plan.inputs),
        _LINEARS: {name: linear.input for name, linear in plan.linears.items()},
        _NORMS: list(plan.norms),
        _FACTORS: list(plan.factors),
    }


def read_plan(path: Path, rest: Mapping[str, Any]) -> W8A8Plan:
    """The plan of :func:`write_plan`, its names in the same order."""
    arrays = load_file(path)
    inputs = {name: arrays[f"{_INPUTS}/{name}"] for name in rest[_INPUTS]}
    return W8A8Plan(
        options=W8A8Options(**rest["options"]),
        inputs={name: QuantizedInput(scale=values[0], shift=values[1]) for name, values in inputs.items()},
        linears={
            name: QuantizedLinear(
                input=given,
                weight=arrays[f"{_LINEARS}/{name}/weight"],
                weight_scale=arrays[f"{_LINEARS}/{name}/scale"],
                bias=arrays.get(f"{_LINEARS}/{name}/bias"),
            )
            for name, given in rest[_LINEARS].items()
        },
        norms={name: arrays[f"{_NORMS}/{name}"] for name in rest[_NORMS]},
        factors={name: arrays[f"{_FACTORS}/{name}"] for name in rest[_FACTORS]},
    )
