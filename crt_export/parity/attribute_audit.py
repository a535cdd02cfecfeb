"""Numbers that a graph holds in attributes of its nodes, and that no weight and no shape would give away."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from crt_export.config import ModelConfig

#: Attributes are float32; a number of the configuration is a float64.
_RELATIVE = 1e-6


def attribute_problems(model: ir.Model, config: ModelConfig, cache_head_dim: int) -> Iterator[str]:
    """Scale of attention, epsilon of LayerNorm, form of GELU, pairs of a rotation that are not the model's.

    One sentence per kind. An attribute that is absent has the default of ONNX. Attention that was decomposed for a
    compiler holds its scale elsewhere; the one-step level judges it.
    """
    scale = config.head_dim**-0.5
    # Wanted, and what an absent attribute means (Attention-23 and -24, LayerNormalization-17, Gelu-20,
    # RotaryEmbedding-23).
    expected: dict[str, dict[str, tuple[float | str, float | str]]] = {
        "Attention": {"scale": (scale, cache_head_dim**-0.5), "softcap": (0.0, 0.0), "is_causal": (0, 0)},
        "LayerNormalization": {"epsilon": (config.layer_norm_eps, 1e-5), "axis": (-1, -1)},
        "Gelu": {"approximate": ("none", "none")},
        "RotaryEmbedding": {
            "interleaved": (int(config.rope_layout == "interleaved"), 0),
            "rotary_embedding_dim": (0, 0),
            "num_heads": (0, 0),
        },
    }
    for operator, attributes in expected.items():
        nodes = [node for node in model.graph.all_nodes() if node.op_type == operator]
        for name, (wanted, default) in attributes.items():
            found = [(node, node.attributes[name].value if name in node.attributes else default) for node in nodes]
            wrong = [(node, value) for node, value in found if not _equal(value, wanted)]
            if wrong:
                node, value = wrong[0]
                absent = "" if name in node.attributes else " by default"
                yield (
                    f"{name} of {operator} is {_text(value)}{absent} in {len(wrong)} nodes "
                    f"({node.name or '(unnamed)'}), expected {_text(wanted)}"
                )


def _equal(value: object, wanted: float | str) -> bool:
    if isinstance(wanted, str) or not isinstance(value, int | float):
        return value == wanted
    return math.isclose(value, wanted, rel_tol=_RELATIVE)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
