"""W8A8: static QuantizeLinear / DequantizeLinear around every linear of an FP16 graph, as TensorRT wants it.

Scales are FP32 and so is everything from the quantised product to the bias: with FP16 scales TensorRT compiles
INT8 products with half-precision results, whose raw accumulators overflow (ONNX Runtime never shows it). Per linear::

    FP16 x -> Cast FP32 [-> Sub shift] -> QuantizeLinear -> DequantizeLinear -+
                                       int8 weight -> DequantizeLinear -> MatMul -> Add FP32 bias -> Cast FP16

Everything else keeps its dtype: residual stream, h, LayerNorm, softmax and cache are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from crt_export.errors import BuildError, problem_list
from crt_export.quantize.linears import constant, require_none_left, weight_matmuls
from crt_export.quantize.plan import QuantizedLinears

_FLOAT = ir.DataType.FLOAT


def quantize_w8a8(graph: ir.Model, quantized: QuantizedLinears) -> int:
    """Quantise every linear of an FP16 graph, in place, and put the folded LayerNorms in.

    Args:
        graph: Exported from the FP16 model, weights under their checkpoint names.
        quantized: Of the same checkpoint.

    Returns:
        Number of quantised MatMuls, a weight used by K passes counted K times.

    Raises:
        BuildError: A linear could not be quantised, or they are those of another model.
    """
    body = graph.graph
    matmuls = weight_matmuls(body)
    _check_shapes(body, matmuls, quantized)
    _replace_norms(body, quantized)
    quantizer = _Quantizer(body, quantized)
    for name, node in matmuls:
        quantizer.quantize(name, node)
    RemoveUnusedNodesPass()(graph)
    require_none_left(body, quantized.linears)
    return len(matmuls)


def _check_shapes(graph: ir.Graph, matmuls: list[tuple[str, ir.Node]], quantized: QuantizedLinears) -> None:
    problems = []
    for name in sorted({name for name, _ in matmuls}):
        found = list(graph.initializers[f"{name}.weight"].const_value.shape)  # type: ignore[union-attr]
        if name not in quantized.linears:
            problems.append(f"{name}.weight is not in the plan")
        elif found != list(quantized.linears[name].weight.shape):
            problems.append(f"{name}.weight is {found}, the plan has {list(quantized.linears[name].weight.shape)}")
    if problems:
        raise BuildError(problem_list(f"graph {graph.name}: the W8A8 plan is for another model", problems))


def _replace_norms(graph: ir.Graph, quantized: QuantizedLinears) -> None:
    for name, values in quantized.norms.items():
        if name in graph.initializers:
            value = graph.initializers[name]
            assert value.dtype is not None
            value.const_value = ir.tensor(values.astype(value.dtype.numpy()), name=name)


class _Quantizer:
    """Rewrites one MatMul after another; an activation is quantised once for all that read it."""

    def __init__(self, graph: ir.Graph, quantized: QuantizedLinears) -> None:
        self._graph, self._linears, self._inputs = graph, quantized.linears, quantized.plan.inputs
        self._quantized: dict[tuple[int, str], ir.Value] = {}

    def quantize(self, name: str, node: ir.Node) -> None:
        """``MatMul(x, weight)`` with its bias Add, all of it FP32 afterwards; the MatMul keeps its name."""
        linear = self._linears[name]
        x = node.inputs[0]
        assert x is not None
        bias_add = self._bias_add(name, node)
        key = (id(x), linear.input)
        if key not in self._quantized:
            self._quantized[key] = self._quantized_activation(x, linear.input, node)
        integers = constant(self._graph, f"{name}.weight_q", linear.weight)
        scales = constant(self._graph, f"{name}.weight_scale", linear.weight_scale)
        weight = self._insert(
            node, "DequantizeLinear", [integers, scales], f"{node.name}/weight", _FLOAT, integers.shape, {"axis": 1}
        )
        node.replace_input_with(0, self._quantized[key])
        node.replace_input_with(1, weight)
        node.outputs[0].type = ir.TensorType(_FLOAT)  # a new one: clones of a graph share theirs
        result, last = node.outputs[0], node
        if bias_add is not None and linear.bias is not None:
            old = self._graph.initializers[f"{name}.bias"]
            index = next(i for i, value in enumerate(bias_add.inputs) if value is old)
            bias_add.replace_input_with(index, constant(self._graph, f"{name}.bias_fp32", linear.bias))
            bias_add.outputs[0].type = ir.TensorType(_FLOAT)
            result, last = bias_add.outputs[0], bias_add
        self._narrow(result, last)

    def _bias_add(self, name: str, node: ir.Node) -> ir.Node | None:
        """The Add of the linear's bias, or None for a linear without one."""
        if self._linears[name].bias is None:
            return None
        users = [user for user, _ in node.outputs[0].uses()]
        bias = self._graph.initializers.get(f"{name}.bias")
        if len(users) != 1 or users[0].op_type != "Add" or bias is None or bias not in users[0].inputs:
            found = ", ".join(f"{user.op_type} {user.name}" for user in users)
            raise BuildError(
                f"graph {self._graph.name}: expected Add of {name}.bias after MatMul {node.name}, found {found}"
            )
        return users[0]

    def _quantized_activation(self, x: ir.Value, name: str, before: ir.Node) -> ir.Value:
        quantized_input = self._inputs[name]
        label = f"{before.name}/input"
        x = self._widened(x, label, before)
        if quantized_input.shift:
            shift = constant(self._graph, f"{name}.input_shift", np.asarray(quantized_input.shift))
            x = self._insert(before, "Sub", [x, shift], f"{label}/shift", _FLOAT, x.shape)
        scale = constant(self._graph, f"{name}.input_scale", np.asarray(quantized_input.scale))
        zero = constant(self._graph, "int8_zero", np.asarray(0, np.int8))
        q = self._insert(before, "QuantizeLinear", [x, scale, zero], f"{label}/quantize", ir.DataType.INT8, x.shape)
        return self._insert(before, "DequantizeLinear", [q, scale, zero], f"{label}/dequantize", _FLOAT, x.shape)

    def _widened(self, x: ir.Value, label: str, before: ir.Node) -> ir.Value:
        """FP32 form of an activation: what it was narrowed from, if anything."""
        if x.dtype == _FLOAT:
            return x
        producer = x.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        if source is not None and source.dtype == _FLOAT:
            return source
        return self._insert(before, "Cast", [x], f"{label}/widen", _FLOAT, x.shape, {"to": _FLOAT})

    def _narrow(self, value: ir.Value, after: ir.Node) -> None:
        """Hand ``value`` on as FP16, but unrounded to those that would widen it again."""
        users = [*value.uses()]
        widening = [user for user, _ in users if user.op_type == "Cast" and user.outputs[0].dtype == _FLOAT]
        others = [(user, index) for user, index in users if user not in widening]
        if others:
            narrow = ir.val(f"{after.name}/narrow", ir.DataType.FLOAT16, value.shape)
            attributes = {"to": ir.DataType.FLOAT16}
            self._graph.insert_after(after, ir.node("Cast", [value], attributes, name=narrow.name, outputs=[narrow]))
            for user, index in others:
                user.replace_input_with(index, narrow)
        for user in widening:
            self._bypass(user, value)

    def _bypass(self, cast: ir.Node, value: ir.Value) -> None:
        """Let the readers of a Cast read ``value``, which then also takes over its name as a graph output."""
        old = cast.outputs[0]
        name = old.name if old.is_graph_output() else value.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self._graph.remove(cast, safe=True)
        value.name = name

    def _insert(
        self,
        before: ir.Node,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        output = ir.val(name, dtype, shape)
        self._graph.insert_before(before, ir.node(operator, inputs, attributes, name=name, outputs=[output]))
        return output
