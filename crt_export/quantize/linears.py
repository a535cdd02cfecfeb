"""Which linears a model has, which of them read the same tensor, and what produces that tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crt_export.config import ModelConfig
from crt_export.errors import InputError

HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class LinearInput:
    """One activation that feeds one or more linears, quantised once for all of them.

    Attributes:
        name: Names the activation in statistics, plans and initializers.
        linears: Checkpoint names of the linears that read it.
        norm: LayerNorm that produces it, or None.
        producer: Linear whose output channels are its channels (v, read by o through attention), or None.
        after_gelu: It is the output of a GELU, hence one-sided.
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    producer: str | None = None
    after_gelu: bool = False


def linear_inputs(config: ModelConfig) -> tuple[LinearInput, ...]:
    """Every activation that enters a linear, in the order of the data flow."""
    inputs = [*_feed_forward("correction", "correction.norm")] if config.recurrent else []
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        attn = f"{layer}.attn"
        inputs += [
            LinearInput(name=f"{attn}.qkv", linears=tuple(f"{attn}.{p}" for p in "qkv"), norm=f"{layer}.attn_norm"),
            LinearInput(name=f"{attn}.o", linears=(f"{attn}.o",), producer=f"{attn}.v"),
            *_feed_forward(f"{layer}.mlp", f"{layer}.mlp_norm"),
        ]
    return (*inputs, LinearInput(name=HEAD, linears=(HEAD,), norm="final_norm"))


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Checkpoint names of all linears, the head last."""
    return tuple(name for group in linear_inputs(config) for name in group.linears)


def expected_matmuls(config: ModelConfig, graph: str, unroll: int = 1) -> int:
    """How many MatMuls with a weight a graph must hold, all of which a quantisation pass must replace.

    Args:
        config: Architecture.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        unroll: Passes unrolled in the graph; every linear but the head occurs once per pass.

    Raises:
        InputError: Unknown graph name.
    """
    if graph not in ("step", "prefill", "prefill_pass", "head"):
        raise InputError(f"expected graph step, prefill, prefill_pass or head, found {graph!r}")
    if graph == "head":
        return 1
    passes = unroll if graph == "prefill" else 1
    return (len(linear_names(config)) - 1) * passes + 1


def _feed_forward(name: str, norm: str) -> Iterator[LinearInput]:
    yield LinearInput(name=f"{name}.up", linears=(f"{name}.up",), norm=norm)
    yield LinearInput(name=f"{name}.down", linears=(f"{name}.down",), after_gelu=True)
