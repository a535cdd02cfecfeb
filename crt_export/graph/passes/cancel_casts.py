"""Pass: remove casts to a wider float and straight back, which unrolling leaves between two passes."""

from __future__ import annotations

import onnx_ir as ir


def cancel_casts(graph: ir.Model) -> int:
    """Replace ``Cast(Cast(x, float32), float16)`` by ``x`` where x is float16; exact, as widening loses nothing.

    Requires: dtypes of the values are known.
    Ensures: no such pair is left; the first cast stays only where something else reads it.

    Returns:
        The number of pairs removed.
    """
    removed = 0
    for node in list(graph.graph):
        source = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if source is None or source.op_type != "Cast" or node.outputs[0].is_graph_output():
            continue
        origin = source.inputs[0]
        wider = source.outputs[0].dtype == ir.DataType.FLOAT
        if origin is not None and wider and origin.dtype == node.outputs[0].dtype == ir.DataType.FLOAT16:
            node.outputs[0].replace_all_uses_with(origin)
            graph.graph.remove(node, safe=True)
            removed += 1
    return removed
