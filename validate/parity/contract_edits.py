"""Edits of an ONNX file that the contract level must name, each a change of the model in place or a maker of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto], object]


def swap(mapping: dict[str, str], *, inputs: bool = True, outputs: bool = False) -> Edit:
    """Exchange tensor names in the nodes."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if inputs:
                node.input[:] = [mapping.get(name, name) for name in node.input]
            if outputs:
                node.output[:] = [mapping.get(name, name) for name in node.output]

    return edit


def both_ways(one: str, other: str) -> dict[str, str]:
    return {one: other, other: one}


def rename_output(model: onnx.ModelProto) -> None:
    swap({"logits": "scores"}, outputs=True)(model)
    next(output for output in model.graph.output if output.name == "logits").name = "scores"


def add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["debug"]))
    model.graph.output.append(helper.make_tensor_value_info("debug", TensorProto.FLOAT, ["batch", 256]))


def half_state(model: onnx.ModelProto) -> None:
    state = next(value for value in model.graph.input if value.name == "state")
    state.type.tensor_type.elem_type = TensorProto.FLOAT16


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("FusedGelu", ["logits"], ["x"], domain="com.example", name="foreign"))
    model.opset_import.append(helper.make_opsetid("com.example", 3))


def dead_reader(model: onnx.ModelProto) -> None:
    """Nothing that counts reads ``hidden`` any more, but a node still does."""
    swap({"hidden": "state"})(model)
    model.graph.node.append(helper.make_node("Abs", ["hidden"], ["dead"]))


def constant_output(model: onnx.ModelProto) -> None:
    swap({"next_position": "computed"}, outputs=True)(model)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int64), "next_position"))


def swap_updates(model: onnx.ModelProto) -> None:
    first, second = (
        node for node in model.graph.node if node.op_type == "TensorScatter" and node.input[0].endswith(".value")
    )
    first.input[1], second.input[1] = second.input[1], first.input[1]


def drop_a_product(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if "layers.1.mlp.up.weight" in node.input)
    node.op_type = "Add"


def move(location: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "embed.weight")
        next(entry for entry in tensor.external_data if entry.key == "location").value = location

    return edit


def older_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 23


def hidden_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16), np.float32), "extra"))


def split_of(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "Split")


def exchange_parts(model: onnx.ModelProto) -> None:
    split = split_of(model)
    split.output[:] = [split.output[1], split.output[0], split.output[2]]


def part_unread(model: onnx.ModelProto) -> None:
    query, key, _ = split_of(model).output
    for node in model.graph.node:
        if query in node.input:
            node.input[:] = [key if name == query else name for name in node.input]


def other_axis(model: onnx.ModelProto) -> None:
    next(attribute for attribute in split_of(model).attribute if attribute.name == "axis").i = 1
