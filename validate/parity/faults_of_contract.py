"""Faults in names, dtypes and operators."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from fault import Fault, in_graphs, in_step
from fault_bundle import SpoiledBundle
from fault_edits import node, replace_output
from onnx import TensorProto, helper


def _rename_output(model: onnx.ModelProto) -> None:
    replace_output("logits", node("Identity", ["before"], "log_probabilities"))(model)
    next(output for output in model.graph.output if output.name == "logits").name = "log_probabilities"


def _add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(node("Identity", ["logits"], "debug"))
    model.graph.output.append(helper.make_tensor_value_info("debug", TensorProto.FLOAT, ["batch", 256]))


def _drop_output(model: onnx.ModelProto) -> None:
    kept = [output for output in model.graph.output if output.name != "next_state"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def _halve(name: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        replace_output(name, node("Cast", ["before"], name, to=TensorProto.FLOAT16))(model)
        output = next(output for output in model.graph.output if output.name == name)
        output.type.tensor_type.elem_type = TensorProto.FLOAT16

    return edit


def _wrong_token(bundle: SpoiledBundle) -> None:
    bundle.edit(["step"], replace_output("next_token", node("Identity", ["input_ids"], "next_token")))


def _foreign_operator(model: onnx.ModelProto) -> None:
    replace_output("logits", node("Tanh", ["before"], "logits"))(model)


_CONTRACT = {"fp32": "contract", "w8": "contract"}
CONTRACT = (
    Fault(
        name="an output renamed",
        inject=in_step(_rename_output),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"logits: .* expected, nothing found"),
    ),
    Fault(
        name="an extra output",
        inject=in_step(_add_output),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"debug: .* found, which is not part of the contract"),
    ),
    Fault(
        name="an output left out",
        inject=in_graphs("prefill")(_drop_output),
        caught=_CONTRACT,
        says=(r"\bprefill\b", r"next_state: .* expected, nothing found"),
    ),
    Fault(
        name="dtype of the logits changed",
        inject=in_step(_halve("logits")),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"logits", r"float32.*float16"),
    ),
    Fault(
        name="dtype of the state changed",
        inject=in_graphs("prefill")(_halve("next_state")),
        caught=_CONTRACT,
        says=(r"\bprefill\b", r"next_state", r"float32.*float16"),
    ),
    Fault(
        name="an operator no target was checked with",
        inject=in_step(_foreign_operator),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"Tanh"),
    ),
    Fault(
        name="next_token is not the argmax",
        inject=_wrong_token,
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"next_token"),
    ),
)
