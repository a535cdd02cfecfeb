"""Numbers that a graph holds in attributes of its nodes, and that no weight and no shape would give away."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from crt_export.config import ModelConfig

#: Attributes are float32; a number of the configuration is a float64.
_RELATIVE = 1e-6


def attribute_problems(model: ir.Model, config: ModelConfig) -> Iterator[str]:
    """Scale of attention, epsilon of LayerNorm, form of GELU that are not the model's; one sentence per kind.

    Attention that was decomposed for a compiler holds its scale elsewhere; the one-step level judges it.
    """
    expected: dict[str, dict[str, float | str]] = {
        "Attention": {"scale": config.head_dim**-0.5, "softcap": 0.0, "is_causal": 0},
        "LayerNormalization": {"epsilon": config.layer_norm_eps, "axis": -1},
        "Gelu": {"approximate": "none"},
    }
    for operator, attributes in expected.items():
        nodes = [node for node in model.graph.all_nodes() if node.op_type == operator]
        for name, wanted in attributes.items():
            found = {node.name or "(unnamed)": node.attributes[name].value for node in nodes if name in node.attributes}
            wrong = {node: value for node, value in found.items() if not _equal(value, wanted)}
            if wrong:
                node, value = next(iter(wrong.items()))
                yield f"{name} of {operator} is {_text(value)} in {len(wrong)} nodes ({node}), expected {_text(wanted)}"


def _equal(value: object, wanted: float | str) -> bool:
    if isinstance(wanted, str) or not isinstance(value, int | float):
        return value == wanted
    return math.isclose(value, wanted, rel_tol=_RELATIVE)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
