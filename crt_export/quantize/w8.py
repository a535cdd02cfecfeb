"""W8: weight-only int8 for ONNX Runtime on a CPU (``com.microsoft.MatMulNBits``).

Weights are quantised in blocks along the input, symmetric, with the operator's default zero point of 128. Accuracy
level 4 lets the kernel quantise each row of the activations on its own: one call of many tokens and many calls of one
token agree but for the order of sums, which now and then rounds an activation the other way.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from crt_export.errors import BuildError, InputError, problem_list
from crt_export.memo import Memo
from crt_export.quantize.norms import smooth_norms
from crt_export.quantize.projections import fuse_projections
from crt_export.quantize.ranges import SMALLEST_STEP
from crt_export.quantize.weights import constant, require_none_left, weight_matmuls

DOMAIN = "com.microsoft"
BLOCK_SIZES = (16, 32, 64, 128, 256)
_BITS = 8
_ZERO = 128
_INT8_ACCURACY = 4


def quantize_w8(graph: ir.Model, block_size: int = 128, *, smooth: bool = True, memo: Memo | None = None) -> int:
    """Replace every MatMul with a weight by MatMulNBits, in place; query, key and value become one of them.

    Args:
        graph: An FP32 graph with weights under their checkpoint names.
        block_size: Weights that share a scale.
        smooth: Balance LayerNorms against the weights that read them first, see :mod:`crt_export.quantize.norms`.
        memo: Of the graphs of one model, which share their weights; None: this graph has no others beside it.

    Returns:
        Number of replaced MatMuls, three for query, key and value, a weight used by K passes counted K times.

    Raises:
        InputError: The kernel has no such block size.
        BuildError: A linear could not be replaced.
    """
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, found {block_size}")
    body, memo = graph.graph, memo or Memo()
    linears = weight_matmuls(body)
    _check_dtype(body, linears)
    fuse_projections(body, memo)
    matmuls = weight_matmuls(body)
    if smooth:
        smooth_norms(matmuls, memo)
    for name, node in matmuls:
        _replace(body, name, node, block_size, memo)
    RemoveUnusedNodesPass()(graph)
    require_none_left(body, {name for name, _ in (*linears, *matmuls)})
    body.opset_imports[DOMAIN] = 1
    return len(linears)


def quantize_blocks(weight: NDArray[np.float32], block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantise in blocks along the input, as ONNX Runtime's own quantiser does.

    The scale is the block's value of largest magnitude over -128, so that this value uses the whole range.

    Args:
        weight: float32 [in, out].
        block_size: Inputs per block; the last block of a column is padded with zeros.

    Returns:
        uint8 [out, blocks, block_size] with zero at 128, and scales float32 [out, blocks], 0 for a block of zeros and
        for one whose scale would be below :data:`SMALLEST_STEP`.
    """
    into, out = weight.shape
    blocks = -(-into // block_size)
    padded = np.zeros((out, blocks * block_size), np.float32)
    padded[:, :into] = weight.T
    padded = padded.reshape(out, blocks, block_size)
    low, high = padded.min(axis=2), padded.max(axis=2)
    scale = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-_ZERO)
    scale[np.abs(scale) < SMALLEST_STEP] = 0
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    levels = padded * inverse[:, :, None] + np.float32(_ZERO)
    return np.clip(np.floor(levels + np.float32(0.5)), 0, 255).astype(np.uint8), scale


def _check_dtype(graph: ir.Graph, matmuls: list[tuple[str, ir.Node]]) -> None:
    found = {f"{name}.weight": graph.initializers[f"{name}.weight"].dtype for name, _ in matmuls}
    problems = [f"{name} is {dtype}" for name, dtype in sorted(found.items()) if dtype != ir.DataType.FLOAT]
    if problems:
        raise BuildError(problem_list(f"graph {graph.name}: weight-only quantisation expects FLOAT weights", problems))


def _replace(graph: ir.Graph, name: str, node: ir.Node, block_size: int, memo: Memo) -> None:
    packed_name, scales_name = f"{name}.weight_blocks", f"{name}.weight_scales"
    tensor = graph.initializers[f"{name}.weight"].const_value
    assert tensor is not None
    into, out = tensor.numpy().shape
    if packed_name not in graph.initializers:
        weight = tensor.numpy()
        packed, scales = memo.made(("blocks", block_size), [weight], lambda: quantize_blocks(weight, block_size))
        constant(graph, packed_name, packed)
        constant(graph, scales_name, scales)
    old = node.outputs[0]
    attributes = {"K": into, "N": out, "bits": _BITS, "block_size": block_size, "accuracy_level": _INT8_ACCURACY}
    new = ir.node(
        "MatMulNBits",
        [node.inputs[0], graph.initializers[packed_name], graph.initializers[scales_name]],
        attributes,
        domain=DOMAIN,
        name=node.name,
        outputs=[ir.val(old.name, old.dtype, old.shape)],
    )
    graph.insert_before(node, new)
    old.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
