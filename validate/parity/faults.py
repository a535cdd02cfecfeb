"""The faults that the gate must catch, each written into the built ONNX files of a bundle.

A fault names the lowest level of the ladder that catches it, per precision, and what the sentence must say. Whatever a
fault does, the bundle is signed again afterwards: see :mod:`fault_bundle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from fault_bundle import SpoiledBundle
from fault_edits import (
    constant,
    drop_first_pass,
    exchange_names,
    exchange_outputs,
    nan_at,
    node,
    replace_output,
    replace_value,
    rotate_halves,
    set_attribute,
    shift_input,
)
from onnx import TensorProto, helper

PREFILLS = ("prefill", "prefill_pass")
RUNNING = ("step", *PREFILLS)
ROPE = ("rope_cos", "rope_sin")
NAN_POSITION = 21
STEPS_LEFT = 20
TOKEN = 101  # "e", the commonest letter of the text


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to be wrong.

    Attributes:
        name: As it stands in the table.
        inject: Writes it into a bundle; raises where the bundle cannot have it.
        caught: The lowest level that catches it, by precision; precisions that are left out are not tried.
        says: Regular expressions that the sentence must match, all of them: where it is.
        layers: Layers that the model must have.
    """

    name: str
    inject: Callable[[SpoiledBundle], None]
    caught: Mapping[str, str]
    says: tuple[str, ...] = ()
    layers: int = 1


def _in_graphs(*graphs: str) -> Callable[..., Callable[[SpoiledBundle], None]]:
    return lambda *edits: lambda bundle: bundle.edit(graphs, *edits)


_step, _prefills, _running = _in_graphs("step"), _in_graphs(*PREFILLS), _in_graphs(*RUNNING)


# --- weights ----------------------------------------------------------------------------------------------------------
def _scaled(name: str, factor: float, outputs: Callable[[SpoiledBundle], slice]) -> Callable[[SpoiledBundle], None]:
    """Some outputs of a linear layer multiplied, in the file all graphs share; an INT8 weight by its scales."""

    def inject(bundle: SpoiledBundle) -> None:
        wanted = outputs(bundle)
        if bundle.precision == "w8":
            values = bundle.weight(f"{name}_scales")  # [out, blocks]
            values[wanted] *= factor
            bundle.set_weight(f"{name}_scales", values)
        else:
            values = bundle.weight(name)  # [in, out]
            values[:, wanted] *= factor
            bundle.set_weight(name, values)

    return inject


def _transposed(bundle: SpoiledBundle) -> None:
    values = bundle.weight("layers.0.attn.o.weight")
    bundle.set_weight("layers.0.attn.o.weight", values.T)


def _zero_bias(bundle: SpoiledBundle) -> None:
    bundle.set_weight("layers.0.mlp.down.bias", np.zeros_like(bundle.weight("layers.0.mlp.down.bias")))


def _foreign_head(bundle: SpoiledBundle) -> None:
    """head.onnx with the output layer of another model: the same values in another order."""
    values = bundle.weight("lm_head.weight", "head")
    order = np.random.default_rng(0).permutation(values.shape[1])
    bundle.set_weight_of("head", "lm_head.weight", values[:, order])


def _short_tables(bundle: SpoiledBundle) -> None:
    for table in ROPE:
        bundle.set_weight_of("step", table, bundle.weight(table)[:STEPS_LEFT])


WEIGHTS = (
    Fault(
        name="one weight tensor scaled by 1 %",
        inject=_scaled("layers.0.mlp.up.weight", 1.01, lambda _: slice(None)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"layers\.0\.mlp\.up\.weight",),
    ),
    Fault(
        name="one row of one weight scaled by 1 %",
        inject=_scaled("lm_head.weight", 1.01, lambda _: slice(TOKEN, TOKEN + 1)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"lm_head\.weight",),
    ),
    Fault(
        name="one attention head's queries scaled by 1 %",
        inject=_scaled("layers.0.attn.q.weight", 1.01, lambda bundle: slice(bundle.config.head_dim)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"layers\.0\.attn\.q\.weight",),
    ),
    Fault(
        name="a square weight transposed",
        inject=_transposed,
        caught={"fp32": "contract"},
        says=(r"layers\.0\.attn\.o\.weight",),
    ),
    Fault(
        name="a bias left out",
        inject=_zero_bias,
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"layers\.0\.mlp\.down\.bias",),
    ),
    Fault(
        name="head of another bundle",
        inject=_foreign_head,
        caught={"fp32": "contract"},
        says=(r"\bhead\b", r"lm_head\.weight"),
    ),
    Fault(
        name="fewer steps than asked: the step graph ends early",
        inject=_short_tables,
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"\bstep\b",),
    ),
)


# --- state ------------------------------------------------------------------------------------------------------------
def _times_zero(value: str, result: str) -> tuple[onnx.NodeProto | TensorProto, ...]:
    return (constant("zero", 0, np.float32), node("Mul", [value, "zero"], result))


def _stale_state(bundle: SpoiledBundle) -> None:
    """At position 0 the step graph starts from a state of its own, such as an earlier text leaves behind."""
    left_behind = np.random.default_rng(0).standard_normal((1, 1, bundle.config.hidden_size))
    bundle.edit(
        ["step"],
        replace_value(
            "state",
            constant("stale", left_behind, np.float32),
            constant("origin", 0),
            constant("stale.axes", [1, 2]),
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
        inject=_step(replace_output("next_state", *_times_zero("before", "next_state"))),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"next_state"),
    ),
    Fault(
        name="state not carried: the step graph ignores its state input",
        inject=_step(replace_value("state", *_times_zero("state", "no_state"), result="no_state")),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
    Fault(
        name="state not carried: prefill ignores its state input",
        inject=_prefills(replace_value("state", *_times_zero("state", "no_state"), result="no_state")),
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
        inject=_prefills(_deaf_to_length),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill",),
    ),
    Fault(
        name="K one too small",
        inject=_in_graphs("prefill")(drop_first_pass),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bprefill\b",),
    ),
)

# --- caches, positions, masks -----------------------------------------------------------------------------------------
_LAYERS = ("key_values.0.", "key_values.1.")


def _unwritten(bundle: SpoiledBundle) -> None:
    """The last layer's keys are written as zeros, through the very operator that the contract wants."""
    last = f"past_key_values.{bundle.config.num_hidden_layers - 1}.key"

    def edit(model: onnx.ModelProto) -> None:
        scatter = next(item for item in model.graph.node if last in item.input and item.op_type == "TensorScatter")
        replace_value(
            scatter.input[1],
            *_times_zero(scatter.input[1], "nothing"),
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
        inject=_step(exchange_names(*_LAYERS)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.[01]"),
        layers=2,
    ),
    Fault(
        name="two layers' caches swapped in every graph",
        inject=_running(exchange_names(*_LAYERS)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"key_values\.[01]",),
        layers=2,
    ),
    Fault(
        name="two layers' caches swapped on the way out only",
        inject=_step(
            exchange_outputs("present_key_values.0.key", "present_key_values.1.key"),
            exchange_outputs("present_key_values.0.value", "present_key_values.1.value"),
        ),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"\bstep\b", r"present_key_values\.0\.key"),
        layers=2,
    ),
    Fault(
        name="keys and values swapped on the way out",
        inject=_step(exchange_outputs("present_key_values.0.key", "present_key_values.0.value")),
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
        inject=_step(shift_input("Gather", 1, 1, first=ROPE)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.0\.key"),
    ),
    Fault(
        name="position off by one: rotary look-up of the prefills",
        inject=_prefills(shift_input("Gather", 1, 1, first=ROPE)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill", r"key_values\.0\.key"),
    ),
    Fault(
        name="position off by one: cache slot that the step graph writes",
        inject=_step(shift_input("TensorScatter", 2, -1, floor=True)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.0"),
    ),
    Fault(
        name="position off by one: next_position",
        inject=_step(replace_output("next_position", node("Identity", ["position"], "next_position"))),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"next_position"),
    ),
    Fault(
        name="mask off by one: the step graph sees one empty slot",
        inject=_step(shift_input("LessOrEqual", 1, 1)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
    Fault(
        name="mask off by one: prefill sees one future token",
        inject=_prefills(shift_input("LessOrEqual", 1, 1)),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"prefill",),
    ),
    Fault(
        name="mask off by one: a token does not see itself",
        inject=_step(_own_token_hidden),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b",),
    ),
)

# --- arithmetic -------------------------------------------------------------------------------------------------------
ARITHMETIC = (
    Fault(
        name="RoPE layout wrong in the step graph",
        inject=_step(rotate_halves),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.0\.key"),
    ),
    Fault(
        name="RoPE layout wrong in every graph",
        inject=_running(rotate_halves),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"key_values\.0\.key",),
    ),
    Fault(
        name="attention scale of twice the head_dim",
        inject=_running(set_attribute("Attention", "scale", lambda scale: scale * 0.5**0.5)),  # type: ignore[operator]
        caught={"fp32": "one-step", "w8": "one-step"},
    ),
    Fault(
        name="LayerNorm epsilon 1e-6 instead of 1e-5",
        inject=_running(set_attribute("LayerNormalization", "epsilon", lambda _: 1e-6)),
        caught={"fp32": "one-step"},
    ),
    Fault(
        name="GELU by tanh instead of erf",
        inject=_running(set_attribute("Gelu", "approximate", lambda _: "tanh")),
        caught={"fp32": "one-step"},
    ),
    Fault(
        name=f"NaN at one step only: logits at position {NAN_POSITION}",
        inject=_step(nan_at("logits", NAN_POSITION)),
        caught={"fp32": "chain", "w8": "chain"},
        says=(r"\bstep\b", rf"\b{NAN_POSITION}\b", r"logits"),
    ),
    Fault(
        name=f"NaN at one step only: next_state at position {NAN_POSITION}",
        inject=_step(nan_at("next_state", NAN_POSITION)),
        caught={"fp32": "chain", "w8": "chain"},
        says=(r"\bstep\b", rf"\b{NAN_POSITION}\b", r"next_state"),
    ),
)


# --- the contract -----------------------------------------------------------------------------------------------------
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
        inject=_step(_rename_output),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"missing \['logits'\], unexpected \['log_probabilities'\]"),
    ),
    Fault(
        name="an extra output",
        inject=_step(_add_output),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"unexpected \['debug'\]"),
    ),
    Fault(
        name="an output left out",
        inject=_in_graphs("prefill")(_drop_output),
        caught=_CONTRACT,
        says=(r"\bprefill\b", r"missing \['next_state'\]"),
    ),
    Fault(
        name="dtype of the logits changed",
        inject=_step(_halve("logits")),
        caught=_CONTRACT,
        says=(r"\bstep\b", r"logits", r"float32.*FLOAT16"),
    ),
    Fault(
        name="dtype of the state changed",
        inject=_in_graphs("prefill")(_halve("next_state")),
        caught=_CONTRACT,
        says=(r"\bprefill\b", r"next_state", r"float32.*FLOAT16"),
    ),
    Fault(
        name="an operator no target was checked with",
        inject=_step(_foreign_operator),
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

FAULTS = (*WEIGHTS, *STATE, *CACHES, *ARITHMETIC, *CONTRACT)
