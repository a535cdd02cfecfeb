"""Faults in caches, positions and masks."""

from __future__ import annotations

import onnx
from fault import ROPE, Fault, in_prefills, in_running, in_step, times_zero
from fault_bundle import SpoiledBundle
from fault_edits import exchange_names, exchange_outputs, node, replace_output, replace_value, shift_input

_LAYERS = ("key_values.0.", "key_values.1.")


def _unwritten(bundle: SpoiledBundle) -> None:
    """The last layer's keys are written as zeros, through the very operator that the contract wants."""
    last = f"past_key_values.{bundle.config.num_hidden_layers - 1}.key"

    def edit(model: onnx.ModelProto) -> None:
        scatter = next(item for item in model.graph.node if last in item.input and item.op_type == "TensorScatter")
        replace_value(
            scatter.input[1],
            *times_zero(scatter.input[1], "nothing"),
            result="nothing",
            consumers=lambda item: item.op_type == "TensorScatter",
        )(model)

    bundle.edit(["step"], edit)


def _own_token_hidden(model: onnx.ModelProto) -> None:
    for item in model.graph.node:
        if item.op_type == "LessOrEqual":
            item.op_type = "Less"


CACHES = (
    Fault(
        name="two layers' caches swapped in the step graph",
        inject=in_step(exchange_names(*_LAYERS)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"\bstep\b", r"key_values\.0\.key stores what layers\.1"),
        layers=2,
    ),
    Fault(
        name="two layers' caches swapped in every graph",
        inject=in_running(exchange_names(*_LAYERS)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"key_values\.0\.key stores what layers\.1",),
        layers=2,
    ),
    Fault(
        name="two layers' caches swapped on the way out only",
        inject=in_step(
            exchange_outputs("present_key_values.0.key", "present_key_values.1.key"),
            exchange_outputs("present_key_values.0.value", "present_key_values.1.value"),
        ),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"\bstep\b", r"present_key_values\.0\.key"),
        layers=2,
    ),
    Fault(
        name="keys and values swapped on the way out",
        inject=in_step(exchange_outputs("present_key_values.0.key", "present_key_values.0.value")),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"\bstep\b", r"present_key_values\.0\.key"),
    ),
    Fault(
        name="cache not written in one layer",
        inject=_unwritten,
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.\d+\.key"),
    ),
    Fault(
        name="position off by one: rotary look-up of the step graph",
        inject=in_step(shift_input("Gather", 1, 1, first=ROPE)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.0\.key"),
    ),
    Fault(
        name="position off by one: rotary look-up of the prefills",
        inject=in_prefills(shift_input("Gather", 1, 1, first=ROPE)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill", r"key_values\.0\.key"),
    ),
    Fault(
        name="position off by one: cache slot that the step graph writes",
        inject=in_step(shift_input("TensorScatter", 2, -1, floor=True)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.0"),
    ),
    Fault(
        name="position off by one: next_position",
        inject=in_step(replace_output("next_position", node("Identity", ["position"], "next_position"))),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"next_position"),
    ),
    Fault(
        name="mask off by one: the step graph sees one empty slot",
        inject=in_step(shift_input("LessOrEqual", 1, 1)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
    Fault(
        name="mask off by one: prefill sees one future token",
        inject=in_prefills(shift_input("LessOrEqual", 1, 1)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill",),
    ),
    Fault(
        name="mask off by one: a token does not see itself",
        inject=in_step(_own_token_hidden),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
)
