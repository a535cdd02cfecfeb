"""Faults in what is computed: rotation, scale, epsilon, activation, NaN."""

from __future__ import annotations

from fault import Fault, in_running, in_step, in_steps
from fault_edits import nan_at, rotate_halves, set_attribute

NAN_POSITION = 21
LATE_POSITION = 28  # beyond the chain of the tests


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
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"scale of Attention is .* expected 0\.\d+",),
    ),
    Fault(
        name="LayerNorm epsilon 1e-6 instead of 1e-5",
        inject=in_running(set_attribute("LayerNormalization", "epsilon", lambda _: 1e-6)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"epsilon of LayerNormalization is 1e-06 .* expected 1e-05",),
    ),
    Fault(
        name="GELU by tanh instead of erf",
        inject=in_running(set_attribute("Gelu", "approximate", lambda _: "tanh")),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"approximate of Gelu is tanh .* expected none",),
    ),
    Fault(
        name=f"NaN at one step only: logits at position {NAN_POSITION}",
        inject=in_steps(nan_at("logits", NAN_POSITION)),
        caught={"fp32": "chain", "w8": "chain"},
        says=(r"\bstep\b", rf"\b{NAN_POSITION}\b", r"logits"),
    ),
    Fault(
        name=f"NaN at one step only: next_state at position {NAN_POSITION}",
        inject=in_steps(nan_at("next_state", NAN_POSITION)),
        caught={"fp32": "chain", "w8": "chain"},
        says=(r"\bstep\b", rf"\b{NAN_POSITION}\b", r"next_state"),
    ),
    Fault(
        name=f"NaN at one step only, after the chain has ended: logits at position {LATE_POSITION}",
        inject=in_steps(nan_at("logits", LATE_POSITION)),
        caught={"fp32": "corpus", "w8": "corpus"},
        says=(r"\bstep\b", rf"\b{LATE_POSITION}\b", r"logits"),
    ),
)
