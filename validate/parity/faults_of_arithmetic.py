"""Faults in what is computed: rotation, scale, epsilon, activation, NaN."""

from __future__ import annotations

from fault import Fault, in_running, in_step
from fault_edits import nan_at, rotate_halves, set_attribute

NAN_POSITION = 21


ARITHMETIC = (
    Fault(
        name="RoPE layout wrong in the step graph",
        inject=in_step(rotate_halves),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"\bstep\b", r"key_values\.0\.key"),
    ),
    Fault(
        name="RoPE layout wrong in every graph",
        inject=in_running(rotate_halves),
        caught={"fp32": "one-step", "w8": "one-step"},
        says=(r"key_values\.0\.key",),
    ),
    Fault(
        name="attention scale of twice the head_dim",
        inject=in_running(set_attribute("Attention", "scale", lambda scale: scale * 0.5**0.5)),  # type: ignore[operator]
        caught={"fp32": "one-step", "w8": "one-step"},
    ),
    Fault(
        name="LayerNorm epsilon 1e-6 instead of 1e-5",
        inject=in_running(set_attribute("LayerNormalization", "epsilon", lambda _: 1e-6)),
        caught={"fp32": "one-step"},
    ),
    Fault(
        name="GELU by tanh instead of erf",
        inject=in_running(set_attribute("Gelu", "approximate", lambda _: "tanh")),
        caught={"fp32": "one-step"},
    ),
    Fault(
        name=f"NaN at one step only: logits at position {NAN_POSITION}",
        inject=in_step(nan_at("logits", NAN_POSITION)),
        caught={"fp32": "chain", "w8": "chain"},
        says=(r"\bstep\b", rf"\b{NAN_POSITION}\b", r"logits"),
    ),
    Fault(
        name=f"NaN at one step only: next_state at position {NAN_POSITION}",
        inject=in_step(nan_at("next_state", NAN_POSITION)),
        caught={"fp32": "chain", "w8": "chain"},
        says=(r"\bstep\b", rf"\b{NAN_POSITION}\b", r"next_state"),
    ),
)
