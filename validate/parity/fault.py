"""One way to be wrong, and where it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, node
from onnx import TensorProto

PREFILLS = ("prefill", "prefill_pass")
RUNNING = ("step", *PREFILLS)
ROPE = ("rope_cos", "rope_sin")
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


def in_graphs(*graphs: str) -> Callable[..., Callable[[SpoiledBundle], None]]:
    """``in_graphs("step")(edit, ...)``: a fault that is these edits of these graphs."""

    def with_edits(*edits: Edit) -> Callable[[SpoiledBundle], None]:
        return lambda bundle: bundle.edit(graphs, *edits)

    return with_edits


#: Every graph that makes steps: the interchange graph, and the one that a session on a CPU loads.
in_steps = in_graphs("step", "prefill_pass")
in_step, in_prefills, in_running = in_graphs("step"), in_graphs(*PREFILLS), in_graphs(*RUNNING)


def times_zero(value: str, result: str) -> tuple[onnx.NodeProto | TensorProto, ...]:
    """Nodes that make zeros of a float32 value."""
    return (constant("zero", 0, np.float32), node("Mul", [value, "zero"], result))
