"""Faults in what is carried from token to token and from pass to pass."""

from __future__ import annotations

import onnx
from fault import TOKEN, Fault, in_graphs, in_prefills, in_step, times_zero
from fault_bundle import SpoiledBundle
from fault_edits import constant, drop_first_pass, node, replace_output, replace_value


def _stale_state(bundle: SpoiledBundle) -> None:
    """At position 0 the step graph starts from a state of its own, an embedding, as if a text went before."""
    bundle.edit(
        ["step"],
        replace_value(
            "state",
            constant("stale.token", [[TOKEN]]),
            constant("origin", 0),
            constant("stale.axes", [1, 2]),
            node("Gather", ["embed.weight", "stale.token"], "stale"),
            node("Equal", ["position", "origin"], "at_origin"),
            node("Unsqueeze", ["at_origin", "stale.axes"], "at_origin.rows"),
            node("Where", ["at_origin.rows", "stale", "state"], "state.kept"),
            result="state.kept",
        ),
    )


def _deaf_to_length(model: onnx.ModelProto) -> None:
    """The last real token is taken to be the last of the chunk; ``next_position`` is right."""
    replace_value(
        "length",
        constant("zero", 0),
        node("Shape", ["input_ids"], "chunk", start=1, end=2),
        node("Mul", ["length", "zero"], "no_length"),
        node("Add", ["no_length", "chunk"], "whole_chunk"),
        result="whole_chunk",
        consumers=lambda item: item.op_type != "Add",
    )(model)


STATE = (
    Fault(
        name="state not carried: next_state is zero",
        inject=in_step(replace_output("next_state", *times_zero("before", "next_state"))),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"next_state"),
    ),
    Fault(
        name="state not carried: the step graph ignores its state input",
        inject=in_step(replace_value("state", *times_zero("state", "no_state"), result="no_state")),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
    Fault(
        name="state not carried: prefill ignores its state input",
        inject=in_prefills(replace_value("state", *times_zero("state", "no_state"), result="no_state")),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill",),
    ),
    Fault(
        name="state carried across reset: stale state at position 0",
        inject=_stale_state,
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
    Fault(
        name="prefill ignores length",
        inject=in_prefills(_deaf_to_length),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill",),
    ),
    Fault(
        name="K one too small",
        inject=in_graphs("prefill")(drop_first_pass),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"\bprefill\b",),
    ),
)
