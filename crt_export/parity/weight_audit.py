"""Every weight in a graph file against the checkpoint.

Linears lie in the files as [in, out]; FP16 files hold the weights rounded to FP16. The INT8 precisions fold smoothing
factors, powers of two, from a LayerNorm (or from v) into the linears that read it. ``w8a8`` has them in its plan; in
``w8`` the stored gain says what it was divided by. The folded gain and bias must then be the checkpoint's divided by
the factor to the last bit, and the dequantised weight the checkpoint's times it to within half a quantisation step,
with the very step that its largest value needs. So a weight or scale off by a per cent is found in every precision, and
none of the quantising code is trusted. Ranges of activations have no counterpart in a checkpoint: every graph must have
those of the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from crt_export.checkpoint import Checkpoint, tensor_shapes
from crt_export.models.registry import linear_weights, tables_of
from crt_export.parity.setup import HALF_PRECISIONS
from crt_export.parity.stored_weights import BlockWeight, ColumnWeight, StoredWeight, deviation
from crt_export.quantize.linears import HEAD, LinearInput, linear_inputs
from crt_export.quantize.plan import W8A8Plan

Array = NDArray[Any]

#: Anonymous constants of a graph (axes, shapes, an attention scale) are smaller than this; weights are larger.
_LARGEST_CONSTANT = 16
#: Cosines of one angle may differ by a unit in the last place between processors.
_TABLE_ERROR = {"float32": 1.2e-7, "float16": 9.8e-4}
#: What a graph holds of the plan: how the activation that several linears read becomes INT8.
_RANGES = (".input_scale", ".input_shift")
_ROWS = 256
#: A bias with a folded shift is a sum in float64, rounded to float32 once.
_BIAS_ERROR = 1e-6

#: Names of initializers that belong together, and what says what is wrong with them.
_Part = tuple[tuple[str, ...], Callable[[], list[str]]]


class Weights:
    """The initializers of one file as arrays; external data stays mapped until it is read."""

    def __init__(self, model: ir.Model) -> None:
        self.tensors = {
            name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
        }
        self.names = self.tensors.keys()

    def array(self, name: str) -> Array:
        """One initializer.

        onnx_ir refuses a weight file with several hard links, as a copy of a bundle may have; what lies in this one was
        compared with the manifest.
        """
        tensor = self.tensors[name]
        if not isinstance(tensor, ir.ExternalTensor) or tensor.size == 0:
            return tensor.numpy()
        place = (tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy()))
        return np.asarray(np.memmap(tensor.path, *place))

    def identity(self, name: str) -> tuple[object, ...]:
        """Equal for equal bytes: the place in a weight file, or a hash of what the graph itself holds."""
        tensor = self.tensors[name]
        kind = (name, tensor.dtype, tuple(tensor.shape))
        if isinstance(tensor, ir.ExternalTensor):
            return (*kind, str(tensor.path), tensor.offset, tensor.length)
        return (*kind, hashlib.sha256(tensor.tobytes()).hexdigest())


@dataclass(kw_only=True)
class WeightAudit:
    """Checks the files of one target; what several files share is looked at once.

    Attributes:
        checkpoint: What the weights must be.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        rounding: How far an INT8 weight may be from the checkpoint's, quantisation steps.
        positions: Rows that rotary tables must have at least; they are cut at the largest capacity of their targets.
        plan: What ``w8a8`` was made by; None in other precisions.
        deviation: Largest distance of an INT8 weight from the checkpoint's in quantisation steps; 0 without INT8.
        different: Values that differ from the checkpoint's where they must be equal.
    """

    checkpoint: Checkpoint
    precision: str
    rounding: float
    positions: int
    plan: W8A8Plan | None = None
    deviation: float = 0.0
    different: int = 0
    _known: dict[object, list[str]] = field(default_factory=dict)

    def problems(self, graph: str, model: ir.Model) -> tuple[list[str], int]:
        """What is wrong with the weights of one graph.

        Args:
            graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
            model: The file; its external data must have been found to lie beside it.

        Returns:
            Sentences, empty if nothing is wrong, and the number of weights looked at.
        """
        parts = [*self._parts(graph, weights := Weights(model))]
        expected = {name for names, _ in parts for name in names}
        problems = [f"weight {name} is missing" for name in sorted(expected - weights.names)]
        for name in sorted(weights.names - expected):
            if (size := weights.tensors[name].size) > _LARGEST_CONSTANT:
                problems.append(f"constant {name} of {size} values is no weight of the checkpoint")
            if name.endswith(_RANGES):
                problems.append(f"{name} is no range of the plan")
        for names, check in parts:
            if weights.names >= {*names}:
                # Shared weights are read once, and what is wrong with them is said of every graph that has them.
                key = (names, *map(weights.identity, names))
                if key not in self._known:
                    self._known[key] = check()
                problems += self._known[key]
        return problems, len(expected & weights.names)

    def _parts(self, graph: str, weights: Weights) -> Iterator[_Part]:
        """What a graph must hold."""
        config = self.checkpoint.config
        plain = {*tensor_shapes(config), f"{HEAD}.weight", *self._tables}
        if graph == "head":
            plain = {name for name in plain if name.startswith(("final_norm.", f"{HEAD}."))}
        groups = [group for group in linear_inputs(config) if graph != "head" or group.name == HEAD]
        for group in groups if self.precision in ("w8", "w8a8") else []:
            joined = _is_joined(group, weights)
            plain -= {*self._norms(group), *(f"{linear}.weight" for linear in group.linears)}
            if self.plan is not None or joined:
                plain -= {f"{linear}.bias" for linear in group.linears}
            if joined:
                yield from self._joined_bias(group, weights)
            yield self._planned(group, self.plan, weights) if self.plan else self._weight_only(group, weights)
        for name in sorted(plain):
            yield (name,), partial(self._plain, name, weights)

    def _plain(self, name: str, weights: Weights) -> list[str]:
        """The checkpoint's own values, rounded to the precision at most."""
        dtype = np.float16 if self.precision in HALF_PRECISIONS else np.float32
        if name in self._tables:
            return self._table_problems(name, weights.array(name), np.dtype(dtype))
        expected = self._original(name)
        transposed = name in linear_weights(self.checkpoint.config)
        return self._differences(name, weights, expected.T if transposed else expected, dtype)

    def _joined_bias(self, group: LinearInput, weights: Weights) -> Iterator[_Part]:
        if f"{group.linears[0]}.bias" in self.checkpoint.tensors:
            biases = np.concatenate([self._original(f"{linear}.bias") for linear in group.linears])
            yield (f"{group.name}.bias",), partial(self._differences, f"{group.name}.bias", weights, biases)

    def _weight_only(self, group: LinearInput, weights: Weights) -> _Part:
        """``w8``: blocks of the linears of one activation, which may be stored side by side under its name."""
        norms, joined = self._norms(group), _is_joined(group, weights)
        stored = (group.name,) if joined else group.linears

        def check() -> list[str]:
            factor: Array = np.ones(self._original(f"{group.linears[0]}.weight").shape[1], np.float32)
            if norms:
                factor = _divisor([self._original(name) for name in norms], [weights.array(name) for name in norms])
            problems = self._folded(norms, weights, factor, np.float32)
            first = 0
            for linear in group.linears:
                out, into = self._original(f"{linear}.weight").shape
                name = group.name if joined else linear
                blocks, scales = (weights.array(f"{name}.weight_{part}") for part in ("blocks", "scales"))
                rows = slice(first, first + out) if joined else slice(None)
                first += out
                block_weight = BlockWeight(blocks=blocks[rows], scales=scales[rows], into=into)
                problems += self._deviation(linear, block_weight, factor)
            return problems

        return (*norms, *(f"{name}.weight_{part}" for name in stored for part in ("blocks", "scales"))), check

    def _planned(self, group: LinearInput, plan: W8A8Plan, weights: Weights) -> _Part:
        """``w8a8``: the ranges of one activation and the linears that read it, by the plan."""
        config, given = self.checkpoint.config, plan.inputs[group.name]
        norms = self._norms(group)
        has_bias = {linear: f"{linear}.bias" in self.checkpoint.tensors for linear in group.linears}
        values = (given.scale, given.shift) if given.shift else (given.scale,)
        ranges = {f"{group.name}{part}": value for part, value in zip(_RANGES, values, strict=False)}
        # v hands its output to o, whose factor its own columns are divided by.
        divisors = {
            other.producer: other.of_producer(plan.inputs[other.name].factor)
            for other in linear_inputs(config)
            if other.producer is not None
        }

        def check() -> list[str]:
            problems = self._folded(norms, weights, given.factor, np.float16)
            for name, value in ranges.items():
                problems += self._differences(name, weights, np.asarray(value))
            for linear in group.linears:
                integers, scales = (weights.array(f"{linear}.weight_{part}") for part in ("q", "scale"))
                stored, divisor = ColumnWeight(integers=integers, scales=scales), divisors.get(linear)
                problems += self._deviation(linear, stored, given.factor, divisor)
                if has_bias[linear]:
                    problems += self._bias(linear, weights, stored, given.shift, divisor)
            return problems

        names = [name for linear in group.linears for name in (f"{linear}.weight_q", f"{linear}.weight_scale")]
        names += [f"{linear}.bias_fp32" for linear in group.linears if has_bias[linear]]
        return (*norms, *ranges, *names), check

    def _folded(self, norms: Sequence[str], weights: Weights, factor: Array, dtype: type) -> list[str]:
        """Gain and bias of a LayerNorm, divided by the factors."""
        folded = {name: self._original(name) / factor for name in norms}
        return [line for name, wanted in folded.items() for line in self._differences(name, weights, wanted, dtype)]

    def _deviation(self, linear: str, stored: StoredWeight, factor: Array, divisor: Array | None = None) -> list[str]:
        weight = self._original(f"{linear}.weight")
        problem = f"expected [out, in] {list(weight.shape)}, found {list(stored.shape)}"
        if stored.shape == weight.shape and len(factor) == weight.shape[1]:
            distance, problem = deviation(stored, weight, factor, divisor, limit=self.rounding)
            self.deviation = max(self.deviation, distance)
        return [f"weight {linear}: {problem}"] if problem else []

    def _bias(
        self, linear: str, weights: Weights, stored: ColumnWeight, shift: np.float32, divisor: Array | None
    ) -> list[str]:
        """The checkpoint's bias plus what the shift of the activation adds to every output."""
        expected = self._original(f"{linear}.bias").astype(np.float64) / (1.0 if divisor is None else divisor)
        if shift:
            sums = stored.integers.sum(axis=0, dtype=np.int64) * stored.scales.astype(np.float64)
            expected = expected + float(shift) * sums
        return self._differences(f"{linear}.bias_fp32", weights, expected, error=_BIAS_ERROR if shift else 0.0)

    def _differences(
        self, name: str, weights: Weights, expected: Array, dtype: type = np.float32, *, error: float = 0.0
    ) -> list[str]:
        """A sentence on the values that are not the expected ones in ``dtype``, to a relative error."""
        found = weights.array(name)
        if found.dtype != dtype or found.shape != expected.shape:
            wanted = f"{np.dtype(dtype)} {list(expected.shape)}"
            return [f"{name}: expected {wanted}, found {found.dtype} {list(found.shape)}"]
        count, largest, example = 0, 0.0, ""
        found, expected = np.atleast_1d(found), np.atleast_1d(expected)
        for start in range(0, len(found), _ROWS):
            part, wanted = found[start : start + _ROWS], expected[start : start + _ROWS].astype(dtype)
            distance = np.abs(part.astype(np.float64) - wanted)
            wrong = (part != wanted) & ~(distance <= error * np.abs(wanted))
            if wrong.any():
                place = np.unravel_index(int(np.nan_to_num(distance, nan=np.inf).argmax()), distance.shape)
                count += int(wrong.sum())
                if not float(distance[place]) <= largest:
                    largest = float(distance[place])
                    where = [int(place[0]) + start, *map(int, place[1:])]
                    example = f"at {where} expected {wanted[place]:.6g}, found {part[place]:.6g}"
        self.different += count
        of = "plan" if name.endswith(_RANGES) else "checkpoint"
        return [f"{name}: {count} of {found.size} values differ from the {of}'s, {example}"] if count else []

    def _table_problems(self, name: str, found: Array, dtype: np.dtype) -> list[str]:
        expected = self._tables[name][: max(len(found), self.positions)].numpy()
        if found.dtype != dtype or found.shape != expected.shape:
            return [f"{name}: expected {dtype} {list(expected.shape)}, found {found.dtype} {list(found.shape)}"]
        error = float(np.abs(found.astype(np.float32) - expected).max())
        if error <= _TABLE_ERROR[str(dtype)]:
            return []
        return [f"{name}: differs from what position x frequency gives by up to {error:.3g}"]

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """What no checkpoint stores."""
        return tables_of(self.checkpoint.config)

    def _norms(self, group: LinearInput) -> list[str]:
        """Gain and bias of the norm that produces an activation, as far as it has them; nothing where none does."""
        names = (f"{group.norm}.weight", f"{group.norm}.bias") if group.norm is not None else ()
        return [name for name in names if name in self.checkpoint.tensors]

    def _original(self, name: str) -> Array:
        tensors = self.checkpoint.tensors
        return tensors[name if name in tensors else "embed.weight"].numpy()  # a tied head is the embedding


def _is_joined(group: LinearInput, weights: Weights) -> bool:
    """Whether a ``w8`` file multiplies the linears of an activation as one, under the activation's name."""
    return len(group.linears) > 1 and f"{group.name}.weight_blocks" in weights.names


def _divisor(originals: Sequence[Array], stored: Sequence[Array]) -> Array:
    """The power of two nearest to what a stored gain, or bias where the gain is zero, was divided by, [channels]."""
    ratio = np.ones(originals[0].shape, np.float64)
    for original, found in zip(originals, stored, strict=True):
        if found.shape == original.shape:
            usable = (ratio == 1) & (original != 0) & (found != 0) & np.isfinite(found)
            ratio[usable] = np.abs(original[usable].astype(np.float64) / found[usable])
    return np.exp2(np.clip(np.rint(np.log2(ratio)), -126, 126)).astype(np.float32)
