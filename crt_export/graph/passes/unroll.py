"""Pass: put K - 1 reading passes in front of the pass that writes the cache.

Every pass of the unroll is the same function of its iterates, so it is exported once and repeated here: tracing K
copies of the model takes K times as long and says nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from crt_export.errors import BuildError
from crt_export.graph.weights import is_weight


def unroll_passes(graph: ir.Model, reading: ir.Model, count: int, iterates: Sequence[tuple[str, str]]) -> None:
    """Prepend ``count`` copies of ``reading``, each fed the iterates of the one before.

    Requires: every input of ``reading`` is an input of ``graph`` of the same dtype; its outputs are the iterates.
    Ensures: inputs and outputs of ``graph`` are as before; weights are shared by name.

    Args:
        graph: The pass that writes the caches.
        reading: A pass that only reads them.
        count: Copies.
        iterates: Pairs (output, input of the pass after it), in the order of the outputs of ``reading``.

    Raises:
        BuildError: The two graphs do not fit together.
    """
    inputs = {value.name: value for value in graph.graph.inputs}
    problems = [
        str(value.name)
        for value in reading.graph.inputs
        if value.name not in inputs or inputs[value.name].dtype != value.dtype
    ]
    if problems or [value.name for value in reading.graph.outputs] != [output for output, _ in iterates]:
        raise BuildError(f"graph {graph.graph.name}: the reading pass does not fit, differing inputs: {problems}")
    original = list(graph.graph)
    first = {source: inputs[source] for _, source in iterates}
    fed = dict(first)
    for index in range(count):
        values: dict[ir.Value, ir.Value] = {value: inputs[value.name] for value in reading.graph.inputs}
        values |= {value: _shared(graph.graph, value) for value in reading.graph.initializers.values()}
        values |= {value: fed[str(value.name)] for value in reading.graph.inputs if value.name in fed}
        nodes = [_copied(node, values, f"pass{index}_") for node in reading.graph]
        graph.graph.insert_before(original[0], nodes)
        fed = {source: values[output] for (_, source), output in zip(iterates, reading.graph.outputs, strict=True)}
    replaced = {first[source]: value for source, value in fed.items()}
    for node in original:
        for position, value in enumerate(node.inputs):
            if value in replaced:
                node.replace_input_with(position, replaced[value])


def _shared(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The initializer of that name in ``graph``; anonymous constants, numbered per graph, get a name of their own."""
    assert value.name is not None
    name = value.name if is_weight(value.name) else f"reading_{value.name}"
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=value.type, shape=value.shape, const_value=value.const_value
        )
    return graph.initializers[name]


def _copied(node: ir.Node, values: dict[ir.Value, ir.Value], prefix: str) -> ir.Node:
    """The node with its inputs replaced; its outputs are added to ``values``."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values[value] for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{prefix}{node.name}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type, new.shape = f"{prefix}{old.name}", old.type, old.shape
        values[old] = new
    return copy


def cancel_casts(graph: ir.Model) -> int:
    """Replace ``Cast(Cast(x, float32), float16)`` by ``x`` where x is float16; exact, as widening loses nothing.

    Unrolling leaves such casts between two passes.

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
