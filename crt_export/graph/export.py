"""PyTorch model -> ONNX graph: ``torch.onnx.export`` over a wrapper, then a fixed list of passes, then the contract."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn

from crt_export.config import ModelConfig
from crt_export.errors import BuildError, InputError
from crt_export.graph.contract import check_contract
from crt_export.graph.modules import (
    HeadModule,
    PlainPrefillModule,
    PlainStepModule,
    PrefillModule,
    StepModule,
)
from crt_export.graph.passes.name_weights import name_weights
from crt_export.graph.passes.simplify import simplify
from crt_export.graph.scatter import translation_table
from crt_export.model import Model
from crt_export.spec import GraphSpec, graph_spec

OPSET = 24
# Sizes of the example inputs: pairwise different, and neither 0 nor 1, which torch.export would bake in.
_EXAMPLE = {"batch": 2, "seq": 3, "capacity": 7}
_TORCH_DTYPES = {"int64": torch.int64, "float32": torch.float32, "float16": torch.float16}
_PER_LAYER_PREFIX = "past_key_values."


def export_graph(model: Model, name: str, *, unroll: int = 1) -> ir.Model:
    """Export one graph of the contract.

    Args:
        model: In evaluation mode; its weight dtype (float32 or float16) is the precision of the graph.
        name: step, prefill, prefill_pass or head.
        unroll: Passes K of ``prefill``; the other graphs have one.

    Returns:
        The graph with batch, seq and capacity symbolic, weights under their checkpoint names.

    Raises:
        InputError: ``unroll`` is below 1.
        UnsupportedError: A model of this kind has no such graph.
        BuildError: The exporter failed.
        ContractError: The exported graph differs from ``graphs/*.toml``.
    """
    if unroll < 1:
        raise InputError(f"unroll (number of passes K) must be at least 1, found {unroll}")
    cache_dtype = str(model.final_norm.weight.dtype).removeprefix("torch.")
    spec = graph_spec(name, model.config, cache_dtype)
    with _quiet_exporter():
        program = torch.onnx.export(
            _module(model, name, unroll).eval(),
            _example_inputs(spec, model.config),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=_dynamic_shapes(spec),
            custom_translation_table=translation_table(),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise BuildError(f"graph {name}: torch.onnx.export returned nothing")
    graph = program.model
    graph.graph.name = name
    name_weights(graph, model)
    simplify(graph, keep={parameter for parameter, _ in model.named_parameters()})
    _name_outputs(graph, spec)
    check_contract(graph, spec)
    return graph


def _module(model: Model, name: str, unroll: int) -> nn.Module:
    if name == "head":
        return HeadModule(model)
    if name == "step":
        return StepModule(model) if model.config.recurrent else PlainStepModule(model)
    if not model.config.recurrent:
        return PlainPrefillModule(model)
    return PrefillModule(model, unroll if name == "prefill" else 1)


def _example_inputs(spec: GraphSpec, config: ModelConfig) -> tuple[Tensor | list[Tensor], ...]:
    """One tensor per input, the caches gathered in one list."""
    single: list[Tensor | list[Tensor]] = []
    caches: list[Tensor] = []
    for tensor in spec.inputs:
        shape = [_EXAMPLE.get(dim, dim) if isinstance(dim, str) else dim for dim in tensor.dims]
        value = torch.zeros(shape, dtype=_TORCH_DTYPES[tensor.dtype])  # type: ignore[arg-type]
        if tensor.name.startswith(_PER_LAYER_PREFIX):
            caches.append(value)
        else:
            single.append(value)
    return (*single, caches) if caches else tuple(single)


def _dynamic_shapes(spec: GraphSpec) -> tuple[dict[int, str] | list[dict[int, str]], ...]:
    single: list[dict[int, str] | list[dict[int, str]]] = []
    caches: list[dict[int, str]] = []
    for tensor in spec.inputs:
        axes = {axis: dim for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)}
        (caches if tensor.name.startswith(_PER_LAYER_PREFIX) else single).append(axes)
    return (*single, caches) if caches else tuple(single)


def _name_outputs(graph: ir.Model, spec: GraphSpec) -> None:
    """Give inputs and outputs the names, dtypes and dims of the contract, in its order."""
    for side, values, tensors in (
        ("inputs", graph.graph.inputs, spec.inputs),
        ("outputs", graph.graph.outputs, spec.outputs),
    ):
        if len(values) != len(tensors):
            raise BuildError(f"graph {spec.name}: exported {len(values)} {side}, the contract has {len(tensors)}")
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name
            if side == "outputs":
                value.shape = ir.Shape(tensor.dims)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself; what it says about the graph is checked by the contract instead."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
