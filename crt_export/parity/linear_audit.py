"""Audit of the linears of a graph: how often and by what they multiply, and what their INT8 weights stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.config import ModelConfig
from crt_export.parity.graph_audit import linear_of, live_nodes
from crt_export.quantize.linears import HEAD, expected_matmuls, linear_inputs
from crt_export.quantize.plan import LARGEST_SCALE, LEVELS, SMALLEST_SCALE, SMALLEST_STEP
from crt_export.quantize.w8 import FUSED

Floats = NDArray[np.float32]
#: A step is a quotient of two float32 values.
STEP_ERROR = 1e-5
_ZERO = 128
#: Values compared at a time.
_CHUNK = 2**21


def linear_problems(model: ir.Model, config: ModelConfig, graph: str, precision: str, unroll: int) -> Iterator[str]:
    """Linears that multiply more or less often than the passes ask for, or in other arithmetic than the precision's.

    Args:
        model: The file.
        config: The model.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        unroll: Passes K of ``prefill``.
    """
    nodes = [(name, node) for node in live_nodes(model.graph) if (name := linear_of(node)) is not None]
    # Only w8 may multiply the linears of one activation at once; in other precisions the name is a foreign one.
    parts = {group.name: group.linears for group in linear_inputs(config) if precision == "w8"}
    products = [linear for name, _ in nodes for linear in parts.get(name, (name,))]
    passes = unroll if graph == "prefill" else 1
    calls = {name: group.calls for group in linear_inputs(config) for name in group.linears}
    wanted = {name: 1 if name == HEAD else passes * count for name, count in calls.items()}
    expected = {name: count for name, count in wanted.items() if graph != "head" or name == HEAD}
    found = Counter(products)
    inner = {found[name] / calls[name] for name in expected if name != HEAD}
    if len(inner) == 1 and inner != {passes}:
        yield f"{inner.pop():g} passes are unrolled, expected {passes}"
    else:
        for name in sorted(expected.keys() | found.keys()):
            if found[name] != expected.get(name, 0):
                yield f"{name} multiplies {found[name]} times, expected {expected.get(name, 0)}"
    total = expected_matmuls(config, graph, unroll)
    if len(products) != total:
        yield f"{len(products)} products with a weight, expected {total} (linears x passes, and the head once)"
    groups = {linear: group.name for group in linear_inputs(config) for linear in group.linears}
    for name, node in nodes:
        problem = _product_problem(name, node, precision, groups.get(name, name))
        if problem:
            yield problem


def _product_problem(name: str, node: ir.Node, precision: str, group: str) -> str | None:
    label = f"{node.op_type} {node.name} of {name}"
    if precision == "w8":
        return _weight_only_problem(name, node, label)
    weight = node.inputs[1]
    quantised = weight is not None and not weight.is_initializer()
    if precision != "w8a8":
        return f"{label} is quantised in a {precision} graph" if quantised else None
    dequantise = weight.producer() if weight is not None else None
    if not quantised or dequantise is None:
        return f"{label} multiplies by a weight that is not INT8"
    names = [value.name if value is not None else None for value in dequantise.inputs]
    if names[:2] != [f"{name}.weight_q", f"{name}.weight_scale"] or len(names) > 2:
        return f"{label} dequantises its weight by {names}, expected {name}.weight_q and {name}.weight_scale"
    return _activation_problem(node, label, group)


def _weight_only_problem(name: str, node: ir.Node, label: str) -> str | None:
    if node.op_type != "MatMulNBits":
        return f"{label} multiplies in floating point, expected MatMulNBits"
    names = [value.name for value in node.inputs[1:] if value is not None]
    if names != [f"{name}.weight_blocks", f"{name}.weight_scales"]:
        return f"{label} reads {names}, expected {name}.weight_blocks and {name}.weight_scales"
    blocks = node.inputs[1].shape if node.inputs[1] is not None else None
    if blocks is None or len(blocks) != 3:
        return f"{label} has blocks of shape {blocks}, expected [out, blocks, block_size]"
    expected = {"bits": 8, "N": blocks[0], "block_size": blocks[2]}
    found = {key: node.attributes[key].as_int() for key in expected if key in node.attributes}
    if found != expected:
        return f"{label} has {found}, expected {expected}"
    parts = FUSED.get(name.rpartition(".")[2])
    return _split_problem(name, node, label, len(parts)) if parts is not None else None


def _split_problem(name: str, node: ir.Node, label: str, parts: int) -> str | None:
    """Several linears at once are one product, one bias if they have any, and one Split, all parts of it used."""
    add = _only_user(node, "Add")
    split = _only_user(node if add is None else add, "Split")
    if add is not None and f"{name}.bias" not in {value.name for value in add.inputs if value is not None}:
        return f"{label} is not followed by an Add of {name}.bias"
    axis = split.attributes["axis"].as_int() if split is not None and "axis" in split.attributes else 0
    used = [bool(value.uses()) for value in split.outputs] if split is not None else []
    widths = [value.name for value in split.inputs[1:] if value is not None] if split is not None else []
    if axis not in (-1, 2) or used != [True] * parts or widths not in ([], [f"{name}.widths"]):
        return f"{label} is not split into {parts} parts along the last axis, all of them read"
    return None


def _only_user(node: ir.Node, operator: str) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == operator else None


def _activation_problem(node: ir.Node, label: str, group: str) -> str | None:
    """An INT8 product also needs its left side through one and the same scale into INT8 and back."""
    dequantise = node.inputs[0].producer() if node.inputs[0] is not None else None
    quantise = None
    if dequantise is not None and dequantise.op_type == "DequantizeLinear" and dequantise.inputs[0] is not None:
        quantise = dequantise.inputs[0].producer()
    if dequantise is None or quantise is None or quantise.op_type != "QuantizeLinear":
        return f"{label} multiplies an activation that is not INT8"
    into, back = ([value.name if value else None for value in side.inputs[1:]] for side in (quantise, dequantise))
    if into != back or not into or into[0] != f"{group}.input_scale":
        return f"{label} quantises its activation by {into} and back by {back}, expected {group}.input_scale in both"
    return None


class StoredWeight(Protocol):
    """One quantised linear, in the checkpoint's orientation [out, in]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        """Values [outs, in], their quantisation steps, and steps that saturation may add to the rounding error."""
        ...

    def steps(self, outs: slice) -> Floats:
        """The stored steps of some outputs, [outs, steps per output]."""
        ...

    def expected_steps(self, weight: Floats) -> Floats:
        """The steps that a weight [outs, in] needs, [outs, steps per output]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWeight:
    """``w8``: blocks uint8 [out, blocks, block_size] with zero at 128, scales float32 [out, blocks] of either sign."""

    blocks: NDArray[np.uint8]
    scales: Floats
    into: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0], self.into

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        size = self.blocks.shape[2]
        levels = self.blocks[outs].reshape(-1, self.blocks.shape[1] * size)[:, : self.into]
        scale = self.scales[outs][:, np.arange(self.into) // size]
        values = (levels.astype(np.float32) - np.float32(_ZERO)) * scale
        # +128 does not exist: what would round there is stored as 127.
        return values, np.abs(scale), (levels == 255).astype(np.float32) / np.float32(2)

    def steps(self, outs: slice) -> Floats:
        return np.abs(self.scales[outs])

    def expected_steps(self, weight: Floats) -> Floats:
        starts = np.arange(0, self.into, self.blocks.shape[2])
        largest: Floats = np.maximum.reduceat(np.abs(weight), starts, axis=1)
        expected: Floats = (largest / np.float32(_ZERO)).astype(np.float32)
        return np.where(expected < SMALLEST_STEP, np.float32(0), expected)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnWeight:
    """``w8a8``: int8 [in, out], scales float32 [out]."""

    integers: NDArray[np.int8]
    scales: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[1], self.integers.shape[0]

    def part(self, outs: slice) -> tuple[Floats, Floats, Floats]:
        scale = self.scales[outs][:, None]
        return self.integers[:, outs].T.astype(np.float32) * scale, scale, np.zeros((1, 1), np.float32)

    def steps(self, outs: slice) -> Floats:
        return self.scales[outs][:, None]

    def expected_steps(self, weight: Floats) -> Floats:
        largest = np.abs(weight).max(axis=1, keepdims=True)
        expected = np.clip(largest / np.float32(LEVELS), SMALLEST_SCALE, LARGEST_SCALE)
        return np.where(largest > 0, expected, np.float32(1)).astype(np.float32)

    def column_sums(self) -> NDArray[np.float64]:
        """Sum of each output's dequantised weights, [out]."""
        return self.integers.sum(axis=0, dtype=np.int64) * self.scales.astype(np.float64)


def deviation(
    stored: StoredWeight, weight: Floats, factor: Floats, divisor: Floats | None = None, *, limit: float
) -> tuple[float, str | None]:
    """How far a stored weight is from what it must stand for.

    Args:
        stored: The weight in the file.
        weight: The checkpoint's, [out, in].
        factor: What smoothing multiplied each input by, [in].
        divisor: What smoothing divided each output by, [out]; None for nothing.
        limit: Largest distance, quantisation steps.

    Returns:
        The largest distance in quantisation steps, less what saturation explains, and a sentence on the worst value
        if it is more than the limit or if a step is not the one its largest value asks for.
    """
    worst, problem = 0.0, None
    for outs in _chunks(stored.shape):
        expected = weight[outs] * factor
        if divisor is not None:
            expected = expected / divisor[outs, None]
        values, step, excess = stored.part(outs)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.abs(values - expected) / step - excess
        # A block of zeros, or of what is none (SMALLEST_STEP), has step 0: anything else is infinitely far from it.
        nothing = (values == expected) | ((values == 0) & (step == 0) & (np.abs(expected) < _ZERO * SMALLEST_STEP))
        distance = np.where(nothing, np.float32(0), np.nan_to_num(distance, nan=np.inf, posinf=np.inf))
        largest = float(distance.max())
        if largest > max(worst, limit):
            row, column = np.unravel_index(int(distance.argmax()), distance.shape)
            problem = (
                f"value [out {outs.start + row}, in {column}] is {values[row, column]:.6g}, the checkpoint's is "
                f"{expected[row, column]:.6g}: {largest:.3g} quantisation steps apart, expected at most {limit:g}"
            )
        worst = max(worst, largest)
        problem = problem or _step_problem(stored.steps(outs), stored.expected_steps(expected), outs.start)
    return worst, problem


def _step_problem(found: Floats, expected: Floats, start: int) -> str | None:
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(found - expected) <= STEP_ERROR * expected)
    if not wrong.any():
        return None
    row, block = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (
        f"scale of output {start + row}, block {block} is {found[row, block]:.6g}, its largest weight needs "
        f"{expected[row, block]:.6g}"
    )


def _chunks(shape: tuple[int, int]) -> Iterator[slice]:
    rows = max(1, _CHUNK // shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
