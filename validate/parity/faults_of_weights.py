"""Faults in the numbers: weights scaled, exchanged, transposed, left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fault import ROPE, TOKEN, Fault
from fault_bundle import SpoiledBundle

STEPS_LEFT = 20


def _scaled(name: str, factor: float, outputs: Callable[[SpoiledBundle], slice]) -> Callable[[SpoiledBundle], None]:
    """Some outputs of a linear layer multiplied, in the file all graphs share; an INT8 weight by its scales.

    A ``w8`` file holds q, k and v as one weight whose first outputs are those of q.
    """

    def inject(bundle: SpoiledBundle) -> None:
        wanted = outputs(bundle)
        if bundle.precision == "w8":
            scales = f"{name}_scales".replace(".attn.q.", ".attn.qkv.")
            values = bundle.weight(scales)  # [out, blocks]
            values[wanted] *= factor
            bundle.set_weight(scales, values)
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
        says=(r"layers\.0\.mlp\.up",),
    ),
    Fault(
        name="one row of one weight scaled by 1 %",
        inject=_scaled("lm_head.weight", 1.01, lambda _: slice(TOKEN, TOKEN + 1)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"lm_head",),
    ),
    Fault(
        name="one attention head's queries scaled by 1 %",
        inject=_scaled("layers.0.attn.q.weight", 1.01, lambda bundle: slice(bundle.config.head_dim)),
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"layers\.0\.attn\.q",),
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
