"""Surgery on a built ONNX file: what the faults of :mod:`faults_of_graphs` and :mod:`faults` are made of.

Every function works on the ``onnx.ModelProto`` of a graph of the contract, of any precision, number of layers and
passes: it finds what it changes by operator and by the names of the contract, never by the exporter's numbered values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto], None]
Part = onnx.NodeProto | TensorProto


def nodes_of(model: onnx.ModelProto, *operators: str) -> list[onnx.NodeProto]:
    """Every node of these kinds.

    Raises:
        AssertionError: There is none, so that the fault would not be one.
    """
    found = [node for node in model.graph.node if node.op_type in operators]
    assert found, f"graph {model.graph.name} has no {' or '.join(operators)}"
    return found


def constant(name: str, value: object, dtype: type = np.int64) -> TensorProto:
    """A constant to go with inserted nodes."""
    return numpy_helper.from_array(np.array(value, dtype), name)


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node with one output."""
    return helper.make_node(operator, list(inputs), [output], **attributes)


def replace_output(name: str, *parts: Part) -> Edit:
    """Put nodes between the producer of an output and the output: they read ``before``, as everybody else does."""

    def edit(model: onnx.ModelProto) -> None:
        for existing in model.graph.node:
            existing.output[:] = ["before" if value == name else value for value in existing.output]
            existing.input[:] = ["before" if value == name else value for value in existing.input]
        _extend(model, parts)

    return edit


def replace_value(
    name: str, *parts: Part, result: str, consumers: Callable[[onnx.NodeProto], bool] = lambda _: True
) -> Edit:
    """Let consumers of a value (input, weight or intermediate) read ``result`` instead, which the parts make of it."""

    def edit(model: onnx.ModelProto) -> None:
        changed = [existing for existing in model.graph.node if name in existing.input and consumers(existing)]
        assert changed, f"graph {model.graph.name} has no such consumer of {name}"
        for existing in changed:
            existing.input[:] = [result if value == name else value for value in existing.input]
        _extend(model, parts)

    return edit


def shift_input(operator: str, index: int, shift: int, *, first: Sequence[str] = (), floor: bool = False) -> Edit:
    """Add a number to one int64 input of every node of a kind.

    Args:
        operator: Kind of node.
        index: Which of its inputs.
        shift: What is added.
        first: Only nodes whose first input is one of these.
        floor: Not below zero.
    """

    def edit(model: onnx.ModelProto) -> None:
        chosen = [item for item in nodes_of(model, operator) if not first or item.input[0] in first]
        assert chosen, f"graph {model.graph.name} has no {operator} of {first}"
        for value in dict.fromkeys(item.input[index] for item in chosen):
            # TensorScatter takes int64 positions; an Add of int64 of any shape.
            parts: list[Part] = [constant(f"{value}.shift", shift), constant(f"{value}.zero", 0)]
            parts.append(node("Add", [value, f"{value}.shift"], f"{value}.moved"))
            if floor:
                parts.append(node("Max", [f"{value}.moved", f"{value}.zero"], f"{value}.floored"))
            for item in chosen:
                if item.input[index] == value:
                    item.input[index] = f"{value}.floored" if floor else f"{value}.moved"
            _extend(model, parts)

    return edit


def set_attribute(operator: str, name: str, change: Callable[[object], object]) -> Edit:
    """Change an attribute of every node of a kind."""

    def edit(model: onnx.ModelProto) -> None:
        for item in nodes_of(model, operator):
            old = next(attribute for attribute in item.attribute if attribute.name == name)
            new = helper.make_attribute(name, change(helper.get_attribute_value(old)))
            item.attribute.remove(old)
            item.attribute.append(new)

    return edit


def times_zero(value: str, result: str) -> tuple[Part, ...]:
    """Nodes that make zeros of a float32 value."""
    return (constant("zero", 0, np.float32), node("Mul", [value, "zero"], result))


def value_at(output: str, position: int, value: float) -> Edit:
    """The output [batch, ...] has one value where ``position`` is that number, else it is as it was."""

    def edit(model: onnx.ModelProto) -> None:
        rank = len(next(value for value in model.graph.output if value.name == output).type.tensor_type.shape.dim)
        replace_output(
            output,
            constant("once.position", position),
            constant("once.axes", list(range(1, rank))),
            constant("once.value", value, np.float32),
            node("Equal", ["position", "once.position"], "once.rows"),
            node("Unsqueeze", ["once.rows", "once.axes"], "once.mask"),
            node("Where", ["once.mask", "once.value", "before"], output),
        )(model)

    return edit


def nan_at(output: str, position: int) -> Edit:
    """The output is NaN where ``position`` is that number."""
    return value_at(output, position, np.nan)


def drop_first_pass(model: onnx.ModelProto) -> None:
    """The unrolled prefill without its first pass: the second starts from ``hidden``. Dead nodes are removed."""
    replace_value("pass0_next_hidden", result="hidden")(model)
    needed = {value.name for value in model.graph.output}
    kept = []
    for item in reversed(model.graph.node):
        if needed.intersection(item.output):
            needed.update(item.input)
            kept.append(item)
    assert len(kept) < len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))


def rotate_halves(model: onnx.ModelProto) -> None:
    """Rotary embedding of the ``half`` layout in a graph of the ``interleaved`` one: pairs (j, j + head_dim/2).

    Every rotation gets its input [.., head_dim] with the channels of such a pair side by side, by way of [.., 2,
    head_dim/2] and a Transpose, and its result is brought back by way of [.., head_dim/2, 2] and another.
    """
    parts: list[Part] = [
        constant("halves", [0, 0, 0, 2, -1]),
        constant("pairs", [0, 0, 0, -1, 2]),
        constant("flat", [0, 0, 0, -1]),
    ]
    for item in nodes_of(model, "RotaryEmbedding"):
        into, out = item.input[0], item.output[0]
        item.input[0], item.output[0] = f"{out}.paired", f"{out}.turned"
        parts += _regrouped(into, "halves", f"{out}.paired")
        parts += _regrouped(f"{out}.turned", "pairs", out)
    _extend(model, parts)


def _regrouped(value: str, groups: str, result: str) -> list[Part]:
    """Split the last axis in two, exchange these and join them again."""
    return [
        node("Reshape", [value, groups], f"{result}.split"),
        node("Transpose", [f"{result}.split"], f"{result}.exchanged", perm=[0, 1, 2, 4, 3]),
        node("Reshape", [f"{result}.exchanged", "flat"], result),
    ]


def exchange_names(first: str, second: str) -> Edit:
    """Exchange two substrings in the names of all values that nodes read and write; the graph's border stays."""

    def renamed(name: str) -> str:
        return name.replace(first, "\0").replace(second, first).replace("\0", second)

    def edit(model: onnx.ModelProto) -> None:
        for item in model.graph.node:
            item.input[:] = [renamed(name) for name in item.input]
            item.output[:] = [renamed(name) for name in item.output]

    return edit


def exchange_outputs(first: str, second: str) -> Edit:
    """Exchange what two outputs deliver; the nodes that read the values are left as they are."""

    def edit(model: onnx.ModelProto) -> None:
        names = {first: second, second: first}
        for item in model.graph.node:
            item.output[:] = [names.get(name, name) for name in item.output]
            item.input[:] = [names.get(name, name) for name in item.input]

    return edit


def set_tensor(name: str, values: np.ndarray) -> Edit:
    """Put values of any shape into the graph under the name of a weight, instead of its reference to a weight file."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    return edit


def stored_tensor(graph: Path, name: str) -> tuple[Path, np.ndarray, int]:
    """A weight of a graph: the file it lies in, a copy of its values, and its offset in bytes."""
    model = onnx.load(graph, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    path, start = graph.parent / place["location"], int(place["offset"])
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims))
    values = np.frombuffer(path.read_bytes(), dtype, count, start).reshape(tensor.dims)
    return path, values.copy(), start


def _extend(model: onnx.ModelProto, parts: Sequence[Part]) -> None:
    model.graph.initializer.extend(part for part in parts if isinstance(part, TensorProto))
    ordered = [*_in_order(model, [part for part in parts if isinstance(part, onnx.NodeProto)])]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _in_order(model: onnx.ModelProto, new: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, each after those that make its inputs."""
    made = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting = [*model.graph.node, *new]
    while waiting:
        left = []
        for item in waiting:
            if made.issuperset(item.input):
                made.update(item.output)
                yield item
            else:
                left.append(item)
        assert len(left) < len(waiting), f"graph {model.graph.name}: nobody makes {sorted(set(left[0].input) - made)}"
        waiting = left
