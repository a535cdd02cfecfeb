"""The linears of a model: which read the same tensor, what produces it, and where a graph multiplies by them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from crt_export.config import ModelConfig
from crt_export.errors import BuildError, InputError, problem_list
from crt_export.models.base import LanguageModel
from crt_export.models.layers import DeclaresLinears, LayerNorm, Linear, RmsNorm
from crt_export.models.registry import meta_model

HEAD = "lm_head"
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


@dataclass(frozen=True, kw_only=True)
class LinearInput:
    """One activation that feeds one or more linears, quantised once for all of them.

    Attributes:
        name: Names the activation in statistics, plans and initializers.
        linears: Checkpoint names of the linears that read it.
        calls: How often each of them multiplies in one pass.
        norm: Norm that produces it and has a gain, or None.
        producer: Linear whose output channels are its channels (v, read by o through attention), or None.
        heads: Heads that the producer's channels are shared out to, in blocks: (of the producer, of the activation);
            they differ where queries are grouped.
        cached: The producer's channels lie in a cache on the way.
        after_gelu: It is the output of a GELU or its like, hence one-sided.
    """

    name: str
    linears: tuple[str, ...]
    calls: int = 1
    norm: str | None = None
    producer: str | None = None
    heads: tuple[int, int] = (1, 1)
    cached: bool = False
    after_gelu: bool = False

    def of_producer(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """One value per channel of the producer, [channels]: the largest of those that read it."""
        ours, theirs = self.heads
        return values.reshape(ours, theirs // ours, -1).max(axis=1).reshape(-1)

    def of_activation(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Per channel of the activation what its producer's channel has, [channels]."""
        ours, theirs = self.heads
        return np.repeat(values.reshape(ours, 1, -1), theirs // ours, axis=1).reshape(-1)


@cache
def linear_inputs(config: ModelConfig) -> tuple[LinearInput, ...]:
    """Every activation that enters a linear, in the order of the data flow, as one pass on no data shows it."""
    model = meta_model(config)
    run = _DryRun(model)
    with torch.device("meta"), run.watching(), torch.no_grad():
        model.reset_tables()
        state = model.start(1)
        ids = torch.zeros((1, 2), dtype=torch.int64)
        model.head(model.unroll(ids, 1, state)[0].hidden)
    return run.inputs()


class _DryRun:
    """What a pass was seen to do: tensors are told apart by identity, so they are kept."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._read: dict[int, list[str]] = {}
        self._calls: dict[str, int] = {}
        self._norms: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the inputs of linears and the outputs of norms."""
        handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, Linear):
                handles.append(module.register_forward_pre_hook(partial(self._linear, name)))
            elif isinstance(module, LayerNorm | RmsNorm):
                handles.append(module.register_forward_hook(partial(self._norm, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._kept.append(inputs[0])
        self._calls[name] = self._calls.get(name, 0) + 1
        self._read.setdefault(id(inputs[0]), []).append(name)

    def _norm(self, name: str, _: nn.Module, __: object, output: torch.Tensor) -> None:
        self._kept.append(output)
        self._norms[id(output)] = name

    def inputs(self) -> tuple[LinearInput, ...]:
        """The activations; a linear that is called again is listed where it was called first."""
        found: dict[tuple[str, ...], LinearInput] = {}
        for tensor, names in self._read.items():
            linears = tuple(names)
            if linears not in found:
                module = self._model.get_submodule(linears[0].rpartition(".")[0])
                last = linears[0].rpartition(".")[2]
                folds = module.folds.get(last) if isinstance(module, DeclaresLinears) else None
                stem = linears[0].removesuffix(last)
                found[linears] = LinearInput(
                    name=_group_name(linears),
                    linears=linears,
                    calls=self._calls[linears[0]],
                    norm=self._norms.get(tensor),
                    producer=None if folds is None else f"{stem}{folds.producer}",
                    heads=(1, 1) if folds is None else folds.heads,
                    cached=folds is not None and folds.cached,
                    after_gelu=isinstance(module, DeclaresLinears) and last in module.one_sided,
                )
        return tuple(found.values())


def _group_name(linears: Sequence[str]) -> str:
    """``layers.0.attn.qkv`` of q, k and v; ``layers.0.mlp.gate_up`` of gate and up; the name of a single one."""
    stem, _, _ = linears[0].rpartition(".")
    parts = [name.rpartition(".")[2] for name in linears]
    joined = ("" if all(len(part) == 1 for part in parts) else "_").join(parts)
    return f"{stem}.{joined}" if stem else joined


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
    of_pass = sum(len(group.linears) * group.calls for group in linear_inputs(config) if group.name != HEAD)
    return of_pass * (unroll if graph == "prefill" else 1) + 1


def weight_matmuls(graph: ir.Graph) -> list[tuple[str, ir.Node]]:
    """Every ``MatMul(x, <name>.weight)`` with a two-dimensional weight, as (name, node) in graph order."""
    found = []
    for node in graph:
        right = node.inputs[1] if node.op_type == "MatMul" else None
        name = (right.name or "") if right is not None else ""
        if name.endswith(".weight") and right is not None and _is_initializer_matrix(right):
            found.append((name.removesuffix(".weight"), node))
    return found


def require_none_left(graph: ir.Graph, linears: Collection[str]) -> None:
    """Check that no linear still multiplies in floating point.

    Raises:
        BuildError: With every weight that is still used, and every product with a constant of any name.
    """
    problems = []
    for name in linears:
        value = graph.initializers.get(f"{name}.weight")
        for node, _ in value.uses() if value is not None else ():
            problems.append(f"{name}.weight is read by {node.op_type} {node.name}")
    for node in graph:
        if node.op_type in _PRODUCTS and any(_is_matrix(value) for value in node.inputs):
            problems.append(f"{node.op_type} {node.name} multiplies by a constant matrix")
    if problems:
        raise BuildError(problem_list(f"graph {graph.name}: linears that were not quantised", sorted(set(problems))))


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """The initializer of that name, made from ``array`` unless the graph already has it."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]


def _is_matrix(value: ir.Value | None) -> bool:
    """A constant of two dimensions, directly or behind a Transpose, Cast, Reshape or Identity."""
    while value is not None:
        producer = value.producer()
        if producer is None:
            return _is_initializer_matrix(value)
        if producer.op_type not in ("Transpose", "Cast", "Reshape", "Identity"):
            return False
        value = producer.inputs[0]
    return False


def _is_initializer_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == 2
