"""Pass: fold constants and merge what the unrolled passes repeat, without ever merging two weights.

``onnxscript.optimizer.optimize`` does the same and more: it also merges equal *weights* (two freshly initialised
LayerNorms, a zero correction), after which a graph refers to one weight under another's name. Weight files are shared
by name, so here only anonymous constants are merged.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from crt_export.errors import BuildError

_CONSTANT_LIMIT = 1024


def simplify(graph: ir.Model, *, keep: AbstractSet[str]) -> None:
    """Fold constants, drop dead nodes, merge equal constants and common subexpressions.

    Requires: weights carry their final names (``keep``).
    Ensures: every weight that was used is still there under its name, unfolded; nothing unused remains, and no
    traceback of the exporting machine either.

    Raises:
        BuildError: A weight was folded into something else.
    """
    common.InlinePass()(graph)
    used = {name for name, value in graph.graph.initializers.items() if name in keep and value.uses()}
    optimizer.fold_constants(
        graph,
        input_size_limit=_CONSTANT_LIMIT,
        output_size_limit=_CONSTANT_LIMIT,
        should_fold=lambda node: False if any(v is not None and v.name in keep for v in node.inputs) else None,
    )
    common.RemoveUnusedNodesPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    merge_repeats(graph, keep=keep)
    common.RemoveUnusedFunctionsPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    common.ClearMetadataAndDocStringPass()(graph)
    lost = used - set(graph.graph.initializers)
    if lost:
        raise BuildError(f"graph {graph.graph.name}: weights folded away: {', '.join(sorted(lost))}")


def merge_repeats(graph: ir.Model, *, keep: AbstractSet[str]) -> None:
    """Merge equal constants and common subexpressions: what every pass of an unroll computes from the same inputs.

    Requires: constants are initializers.
    Ensures: one node for one value, unique names; weights (``keep``) are never merged with each other.
    """
    _merge_constants(graph, keep)
    common.CommonSubexpressionEliminationPass()(graph)
    common.IdentityEliminationPass()(graph)
    common.RemoveUnusedNodesPass()(graph)
    common.NameFixPass()(graph)


def _merge_constants(graph: ir.Model, keep: AbstractSet[str]) -> None:
    seen: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        if name in keep or tensor is None or tensor.size > _CONSTANT_LIMIT:
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        first = seen.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.graph.initializers[name]
