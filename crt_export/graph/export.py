"""PyTorch model -> ONNX graph: ``torch.onnx.export`` over a wrapper, then a fixed list of passes, then the contract."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from crt_export.errors import BuildError, InputError
from crt_export.graph.contract import check_contract
from crt_export.graph.modules import HeadModule, PassModule, ReadingPassModule, StepModule
from crt_export.graph.operators import translation_table
from crt_export.graph.passes.simplify import merge_repeats, simplify
from crt_export.graph.passes.unroll import cancel_casts, unroll_passes
from crt_export.models.base import LanguageModel
from crt_export.models.declaration import Carried
from crt_export.spec import GraphSpec, TensorSpec, graph_spec

OPSET = 24
# Sizes of the example inputs: pairwise different, and neither 0 nor 1, which torch.export would bake in.
_EXAMPLE = {"batch": 2, "seq": 3, "capacity": 7}
_TORCH_DTYPES = {"int64": torch.int64, "float32": torch.float32, "float16": torch.float16}


class GraphExporter:
    """Exports the graphs of one model; what several of them are made of is traced once.

    Args:
        model: In evaluation mode; its weight dtype (float32 or float16) is the precision of the graphs.
        traced: What need not be traced any more, by name of :func:`parts_of_graphs`, this model's weights in it.
    """

    def __init__(self, model: LanguageModel, traced: Mapping[str, ir.Model] | None = None) -> None:
        self._model = model
        self._weights = frozenset(weights_of_model(model))
        self._cache_dtype = str(model.dtype).removeprefix("torch.")
        self._traced = dict(traced or {})

    def graph(self, name: str, *, unroll: int = 1) -> ir.Model:
        """Export one graph of the contract.

        Args:
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
        spec = graph_spec(name, self._model.config, self._cache_dtype)
        if name == "prefill" and self._model.carried.iterated:
            graph = self._unrolled(unroll)
        else:
            graph = self.part(name).clone()
        graph.graph.name = name
        check_contract(graph, spec)
        return graph

    def _unrolled(self, unroll: int) -> ir.Model:
        graph = self.part("prefill_pass").clone()
        if unroll > 1:
            spec = graph_spec("prefill_pass", self._model.config, self._cache_dtype)
            iterates = [(output, source) for output, source in spec.continues if source in _iterates(spec)]
            unroll_passes(graph, self.part("reading_pass"), unroll - 1, iterates)
            cancel_casts(graph)
            merge_repeats(graph, keep=self._weights)
        return graph

    def part(self, name: str) -> ir.Model:
        """What graphs are made of, traced when it is first asked for; not to be changed.

        Args:
            name: Of :func:`parts_of_graphs`.

        Raises:
            UnsupportedError: A model of this kind has no such graph.
            BuildError: The exporter failed.
        """
        if name not in self._traced:
            reading = name == "reading_pass"
            spec = graph_spec("prefill_pass" if reading else name, self._model.config, self._cache_dtype)
            spec = _reading_spec(spec) if reading else spec
            graph = _onnx_from_module(_module(self._model, name), name, spec)
            graph.graph.name = name
            _name_weights(graph, self._model)
            simplify(graph, keep=self._weights)
            _name_values(graph, spec)
            _read_sizes_of_first(graph, spec)
            _share_weights(graph, self._model)
            self._traced[name] = graph
        return self._traced[name]


def parts_of_graphs(carried: Carried, graphs: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """What must be traced for graphs of a model, each (name, passes K), in the order it is asked for."""
    parts: dict[str, None] = {}
    for name, unroll in graphs:
        unrolled = name == "prefill" and carried.iterated
        parts["prefill_pass" if unrolled else name] = None
        if unrolled and unroll > 1:
            parts["reading_pass"] = None
    return tuple(parts)


def export_graph(model: LanguageModel, name: str, *, unroll: int = 1) -> ir.Model:
    """Export a single graph, see :meth:`GraphExporter.graph`."""
    return GraphExporter(model).graph(name, unroll=unroll)


def weights_of_model(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and tables by checkpoint name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _onnx_from_module(module: nn.Module, name: str, spec: GraphSpec) -> ir.Model:
    with _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            _grouped(spec, name, _example),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=_grouped(spec, name, _dynamic_axes),
            custom_translation_table=translation_table(),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise BuildError(f"graph {spec.name}: torch.onnx.export returned nothing")
    return program.model


_MODULES = {"head": HeadModule, "step": StepModule, "reading_pass": ReadingPassModule}


def _module(model: LanguageModel, name: str) -> nn.Module:
    return _MODULES.get(name, PassModule)(model)


def _iterates(spec: GraphSpec) -> list[str]:
    return [tensor.name for tensor in spec.inputs if tensor.group == "iterate"]


def _reading_spec(spec: GraphSpec) -> GraphSpec:
    """What a pass before the last takes and gives: no length, no cache out, only the next iterates."""
    sources = _iterates(spec)
    given = [output for output, source in spec.continues if source in sources]
    return replace(
        spec,
        inputs=tuple(tensor for tensor in spec.inputs if tensor.name != "length"),
        outputs=tuple(tensor for tensor in spec.outputs if tensor.name in given),
        aliases=(),
        continues=(),
    )


def _grouped(spec: GraphSpec, name: str, each: Callable[[TensorSpec], Any]) -> tuple[Any, ...]:
    """Something for every argument of a wrapper: one for a tensor, a list for states, iterates and caches each."""
    single = [each(tensor) for tensor in spec.inputs if not tensor.group]
    if name == "head":
        return tuple(single)
    groups = ("state", "cache") if name == "step" else ("state", "iterate", "cache")
    return (*single, *([each(tensor) for tensor in spec.inputs if tensor.group == group] for group in groups))


def _example(tensor: TensorSpec) -> Tensor:
    shape = [_EXAMPLE.get(dim, dim) if isinstance(dim, str) else dim for dim in tensor.dims]
    return torch.zeros(shape, dtype=_TORCH_DTYPES[tensor.dtype])  # type: ignore[arg-type]


def _dynamic_axes(tensor: TensorSpec) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)}


def _name_weights(graph: ir.Model, model: nn.Module) -> None:
    """Parameters and tables get their checkpoint names: the wrapper holds the model as ``model``."""
    for value in list(graph.graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix("model.")
    known = weights_of_model(model)
    missing = [name for name in graph.graph.initializers if "." in name and name not in known]
    if missing:
        raise BuildError(f"graph {graph.graph.name}: initializers under foreign names: {', '.join(missing)}")


def _share_weights(graph: ir.Model, model: LanguageModel) -> None:
    """Weights are the model's own memory: what several graphs share is known to be the same, and not copied."""
    for name, tensor in weights_of_model(model).items():
        value = graph.graph.initializers.get(name)
        if value is not None:
            value.const_value = ir.tensor(tensor.detach().numpy(), name=name)


def _name_values(graph: ir.Model, spec: GraphSpec) -> None:
    """Give inputs and outputs the names, dtypes and dims of the contract, in its order."""
    names: dict[str, str] = {}
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
            else:
                names |= _names_of_dims(value, tensor)
    for node in graph.graph:
        for value in node.outputs:
            _rename_dims(value, names)
    for value in graph.graph.inputs:
        _rename_dims(value, names)


def _names_of_dims(value: ir.Value, tensor: TensorSpec) -> dict[str, str]:
    """What the exporter calls the symbolic dims of an input, which are its own where a list of inputs is empty."""
    if value.shape is None or len(value.shape) != len(tensor.dims):
        return {}
    pairs = zip(value.shape, tensor.dims, strict=True)
    return {str(found): dim for found, dim in pairs if isinstance(found, ir.SymbolicDim) and isinstance(dim, str)}


def _rename_dims(value: ir.Value, names: Mapping[str, str]) -> None:
    if value.shape is not None and any(str(dim) in names for dim in value.shape):
        value.shape = ir.Shape([names.get(str(dim), dim) for dim in value.shape])


def _read_sizes_of_first(graph: ir.Model, spec: GraphSpec) -> None:
    """Take a symbolic size from the first input that has it: of an iterate, each pass of an unroll would ask anew."""
    first: dict[str, tuple[ir.Value, int]] = {}
    inputs = dict(zip(graph.graph.inputs, spec.inputs, strict=True))
    for value, tensor in inputs.items():
        for axis, dim in enumerate(tensor.dims):
            if isinstance(dim, str):
                first.setdefault(dim, (value, axis))
    for node in graph.graph:
        source = inputs.get(node.inputs[0]) if node.op_type == "Shape" and node.inputs[0] is not None else None
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        if source is None or start is None or end != start + 1 or not isinstance(source.dims[start], str):
            continue
        value, axis = first[str(source.dims[start])]
        node.replace_input_with(0, value)
        node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)


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
