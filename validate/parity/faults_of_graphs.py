"""Faults in what graphs compute, each an edit of the built files of a bundle.

A fault names the lowest level of the ladder that catches it, per precision, and what the sentence must say. Whatever a
fault does, the bundle is signed again afterwards (:mod:`fault_bundle`): no hash gives it away.

A session on a CPU loads ``prefill_pass.onnx`` for steps and prefill alike; ``step.onnx`` and ``prefill.onnx`` lie
beside it for other runtimes. Most faults are written into either: where a session sees it, the levels that run the
target answer for it; where it does not, the check that ties these graphs to a session's does, or the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from fault_bundle import SpoiledBundle
from fault_edits import (
    Edit,
    constant,
    drop_first_pass,
    exchange_names,
    exchange_outputs,
    node,
    replace_output,
    replace_value,
    rotate_halves,
    set_attribute,
    shift_input,
    times_zero,
    value_at,
)

SESSION, STEP, PREFILL = "prefill_pass", "step", "prefill"
GRAPHS = (STEP, PREFILL, SESSION)
ROPE = ("rope_cos", "rope_sin")
TOKEN = 101  # "e", the commonest letter of the text
FAULTY_POSITION = 21
LATE_POSITION = 28  # beyond the chain of the tests
BOTH = ("fp32", "w8")
_LAYERS = ("key_values.0.", "key_values.1.")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to be wrong.

    Attributes:
        name: As it stands in the table.
        inject: Writes it into a bundle; raises where the bundle cannot have it.
        caught: The lowest level that catches it, by precision; precisions that are left out are not tried.
        says: Regular expressions that the sentence must match, all of them: where it is.
        layers: Layers that the model must have.
        interchange: Whether it is only in graphs that no session opens.
    """

    name: str
    inject: Callable[[SpoiledBundle], None]
    caught: Mapping[str, str]
    says: tuple[str, ...] = ()
    layers: int = 1
    interchange: bool = False


def of(
    name: str,
    level: str,
    *edits: Edit,
    graphs: tuple[str, ...] = GRAPHS,
    says: tuple[str, ...] = (),
    layers: int = 1,
) -> Fault:
    """A fault that is these edits of some graphs."""
    return Fault(
        name=name,
        inject=lambda bundle: bundle.edit(graphs, *edits),
        caught=dict.fromkeys(BOTH, level),
        says=says,
        layers=layers,
        interchange=SESSION not in graphs,
    )


def beside(name: str, level: str, *edits: Edit, says: tuple[str, ...] = (), layers: int = 1) -> Iterator[Fault]:
    """The same edits of the graph that a session loads, and of the step graph beside it; ``{}`` names the graph."""
    for words, graph in (("the session's graph", SESSION), ("step", STEP)):
        place = rf"\b{graph}\b" if graph == STEP or level == "contract" else ""
        yield of(name.format(words), level, *edits, graphs=(graph,), says=(place, *says), layers=layers)


def _stale_state(model: onnx.ModelProto) -> None:
    """At position 0 the graph starts from a state of its own, an embedding, as if a text went before."""
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
    )(model)


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


def _unwritten(model: onnx.ModelProto) -> None:
    """The last layer's keys are written as zeros, through the very operator that the contract wants."""
    scatter = next(
        item
        for item in reversed(model.graph.node)
        if item.op_type == "TensorScatter" and item.input[0].endswith(".key")
    )
    replace_value(
        scatter.input[1],
        *times_zero(scatter.input[1], "nothing"),
        result="nothing",
        consumers=lambda item: item.op_type == "TensorScatter",
    )(model)


def _own_token_hidden(model: onnx.ModelProto) -> None:
    for item in model.graph.node:
        if item.op_type == "LessOrEqual":
            item.op_type = "Less"


_NO_STATE = replace_value("state", *times_zero("state", "no_state"), result="no_state")
_KEY = r"key_values\.0\.key"

#: What is carried from token to token and from pass to pass.
STATE = (
    *beside(
        "state not carried: next_state of {} is zero",
        "one-step",
        replace_output("next_state", *times_zero("before", "next_state")),
        says=("next_state",),
    ),
    *beside("state not carried: {} ignores its state input", "one-step", _NO_STATE),
    of("state not carried: prefill ignores its state input", "one-step", _NO_STATE, graphs=(PREFILL, SESSION)),
    *beside("state carried across reset: stale state at position 0 in {}", "one-step", _stale_state),
    of("prefill ignores length", "one-step", _deaf_to_length, graphs=(PREFILL, SESSION), says=("prefill",)),
    of("prefill.onnx ignores length", "one-step", _deaf_to_length, graphs=(PREFILL,), says=(r"\bprefill\b",)),
    of("K one too small", "contract", drop_first_pass, graphs=(PREFILL,), says=(r"\bprefill\b",)),
)

#: Caches, positions and masks.
CACHES = (
    *beside(
        "two layers' caches swapped in {}",
        "contract",
        exchange_names(*_LAYERS),
        says=(rf"{_KEY} stores what layers\.1",),
        layers=2,
    ),
    of(
        "two layers' caches swapped in every graph",
        "contract",
        exchange_names(*_LAYERS),
        says=(rf"{_KEY} stores what layers\.1",),
        layers=2,
    ),
    *beside(
        "two layers' caches swapped on the way out of {} only",
        "contract",
        exchange_outputs("present_key_values.0.key", "present_key_values.1.key"),
        exchange_outputs("present_key_values.0.value", "present_key_values.1.value"),
        says=(r"present_key_values\.0\.key",),
        layers=2,
    ),
    *beside(
        "keys and values swapped on the way out of {}",
        "contract",
        exchange_outputs("present_key_values.0.key", "present_key_values.0.value"),
        says=(r"present_key_values\.0\.key",),
    ),
    *beside("cache not written in one layer of {}", "one-step", _unwritten, says=(r"key_values\.\d+\.key",)),
    *beside(
        "position off by one: rotary look-up of {}",
        "one-step",
        shift_input("Gather", 1, 1, first=ROPE),
        says=(_KEY,),
    ),
    of(
        "position off by one: rotary look-up of prefill.onnx",
        "one-step",
        shift_input("Gather", 1, 1, first=ROPE),
        graphs=(PREFILL,),
        says=("prefill", _KEY),
    ),
    *beside(
        "position off by one: cache slot that {} writes",
        "one-step",
        shift_input("TensorScatter", 2, -1, floor=True),
        says=(r"key_values\.0",),
    ),
    *beside(
        "position off by one: next_position of {}",
        "one-step",
        replace_output("next_position", node("Identity", ["position"], "next_position")),
        says=("next_position",),
    ),
    *beside("mask off by one: {} sees one empty slot", "one-step", shift_input("LessOrEqual", 1, 1)),
    of(
        "mask off by one: prefill sees one future token",
        "one-step",
        shift_input("LessOrEqual", 1, 1),
        graphs=(PREFILL, SESSION),
        says=("prefill",),
    ),
    *beside("mask off by one: a token does not see itself in {}", "one-step", _own_token_hidden),
)

#: What is computed: rotation, scale, epsilon, activation, and values that are wrong once.
ARITHMETIC = (
    *beside("RoPE layout wrong in {}", "one-step", rotate_halves, says=(_KEY,)),
    of("RoPE layout wrong in every graph", "one-step", rotate_halves, says=(_KEY,)),
    of(
        "attention scale of twice the head_dim",
        "contract",
        set_attribute("Attention", "scale", lambda scale: scale * 0.5**0.5),  # type: ignore[operator]
        says=(r"scale of Attention is .* expected 0\.\d+",),
    ),
    of(
        "LayerNorm epsilon 1e-6 instead of 1e-5",
        "contract",
        set_attribute("LayerNormalization", "epsilon", lambda _: 1e-6),
        says=(r"epsilon of LayerNormalization is 1e-06 .* expected 1e-05",),
    ),
    of(
        "GELU by tanh instead of erf",
        "contract",
        set_attribute("Gelu", "approximate", lambda _: "tanh"),
        says=(r"approximate of Gelu is tanh .* expected none",),
    ),
    *(
        fault
        for name in ("logits", "next_state")
        for fault in beside(
            f"NaN at one step only: {name} of {{}} at position {FAULTY_POSITION}",
            "one-step",
            value_at(name, FAULTY_POSITION, np.nan),
            says=(rf"\b{FAULTY_POSITION}\b", name),
        )
    ),
    # The graphs agree with each other, so what compares a text with PyTorch is left to answer.
    of(
        f"zeros at one step only: logits of every graph at position {FAULTY_POSITION}",
        "chain",
        value_at("logits", FAULTY_POSITION, 0),
        graphs=(STEP, SESSION),
        says=(rf"\b{FAULTY_POSITION}\b", "logits"),
    ),
    of(
        f"zeros at one step only: next_state of every graph at position {FAULTY_POSITION}",
        "chain",
        value_at("next_state", FAULTY_POSITION, 0),
        graphs=(STEP, SESSION),
        says=(rf"\b{FAULTY_POSITION}\b",),
    ),
    of(
        f"zeros at one step only, after the chain has ended: logits of every graph at position {LATE_POSITION}",
        "corpus",
        value_at("logits", LATE_POSITION, 0),
        graphs=(STEP, SESSION),
        says=("logit",),
    ),
)
