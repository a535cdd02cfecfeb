"""Every weight in a graph file against the checkpoint.

Linears lie in the files as [in, out]; FP16 files hold the weights rounded to FP16. The INT8 forms fold smoothing
factors, powers of two, from a LayerNorm (or from v) into the linears that read it. Each factor is recovered from the
folded gain and bias, which must be the checkpoint's divided by it to the last bit; the dequantised weight must then be
the checkpoint's times it to within half a quantisation step, with the very step that its largest value asks for. So a
weight or scale off by a per cent is found in every precision, and none of the quantising code is trusted. Activation
scales have no counterpart in a checkpoint: they must be the same in every graph of the target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.checkpoint import Checkpoint, tensor_shapes
from crt_export.parity.case import HALF_PRECISIONS
from crt_export.parity.folded_weights import FoldedGroup, folded_names, is_fused
from crt_export.quantize.linears import HEAD, linear_inputs, linear_names
from crt_export.rotary import rope_tables

Array = NDArray[Any]

#: Anonymous constants of a graph (axes, shapes, an attention scale) are smaller than this; weights are larger.
_LARGEST_CONSTANT = 16
#: Cosines of one angle may differ by a unit in the last place between processors.
_TABLE_ERROR = {"float32": 1.2e-7, "float16": 9.8e-4}
_TABLES = ("rope_cos", "rope_sin")
_ROWS = 256


class Weights:
    """The initializers of one file as arrays; external data stays mapped until it is read."""

    def __init__(self, model: ir.Model) -> None:
        self._tensors = {
            name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
        }
        self.names = frozenset(self._tensors)

    def array(self, name: str) -> Array:
        """One initializer.

        onnx_ir refuses a weight file with several hard links, as a copy of a bundle may have; what lies in this one was
        compared with the manifest.
        """
        tensor = self._tensors[name]
        if not isinstance(tensor, ir.ExternalTensor) or tensor.size == 0:
            return tensor.numpy()
        place = (tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy()))
        return np.asarray(np.memmap(tensor.path, *place))

    def size(self, name: str) -> int:
        """Number of its values."""
        return int(self._tensors[name].size)

    def identity(self, name: str) -> tuple[object, ...]:
        """Equal for equal bytes: the place in a weight file, or a hash of what the graph itself holds."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return (name,)
        kind = (name, tensor.dtype, tuple(tensor.shape))
        if isinstance(tensor, ir.ExternalTensor):
            return (*kind, str(tensor.path), tensor.offset, tensor.length)
        return (*kind, hashlib.sha256(tensor.tobytes()).hexdigest())


@dataclass
class WeightAudit:
    """Checks the files of one target; what several files share is looked at once.

    Attributes:
        checkpoint: What the weights must be.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        rounding: How far an INT8 weight may be from the checkpoint's, quantisation steps.
        deviation: Largest distance of an INT8 weight from the checkpoint's in quantisation steps; 0 without INT8.
        different: Values that differ from the checkpoint's where they must be equal.
    """

    checkpoint: Checkpoint
    precision: str
    rounding: float
    deviation: float = 0.0
    different: int = 0
    _known: dict[object, list[str]] = field(default_factory=dict)
    _scalars: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def problems(self, graph: str, model: ir.Model) -> tuple[list[str], int]:
        """What is wrong with the weights of one graph.

        Args:
            graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
            model: The file; its external data must have been found to lie beside it.

        Returns:
            Sentences, empty if nothing is wrong, and the number of weights looked at.
        """
        weights = Weights(model)
        expected = self._expected(graph, weights)
        problems = [f"weight {name} is missing" for name in sorted(expected - weights.names)]
        problems += [
            f"constant {name} of {weights.size(name)} values is no weight of the checkpoint"
            for name in sorted(weights.names - expected)
            if weights.size(name) > _LARGEST_CONSTANT
        ]
        for name in sorted(self._plain_names(graph, weights) & weights.names):
            problems += self._once((weights.identity(name),), lambda name=name: self._plain(weights, name))
        if self._quantised:
            problems += self._groups(graph, weights)
        problems += self._differing_scalars(graph, weights)
        return problems, len(expected & weights.names)

    @property
    def _quantised(self) -> bool:
        return self.precision in ("w8", "w8a8")

    def _once(self, key: tuple[object, ...], check: Callable[[], list[str]]) -> list[str]:
        """Shared weights are read once, and what is wrong with them is said of every graph that has them."""
        if key not in self._known:
            self._known[key] = check()
        return self._known[key]

    def _expected(self, graph: str, weights: Weights) -> set[str]:
        folded = folded_names(self.checkpoint.config, self.precision, graph, weights.names)
        return self._plain_names(graph, weights) | folded

    def _plain_names(self, graph: str, weights: Weights) -> set[str]:
        """What must be the checkpoint's own values, rounded to the precision at most."""
        config = self.checkpoint.config
        names = {*tensor_shapes(config), f"{HEAD}.weight", *_TABLES}
        if graph == "head":
            names = {name for name in names if name.startswith(("final_norm.", f"{HEAD}."))}
        if self._quantised:
            folded = [f"{name}.weight" for name in linear_names(config)]
            folded += [f"{group.norm}.{part}" for group in linear_inputs(config) for part in ("weight", "bias")]
            if self.precision == "w8a8":
                folded += [f"{name}.bias" for name in linear_names(config)]
            names -= set(folded)
        if graph != "head":
            for joined, parts in self._joined_biases(weights).items():
                names = (names - {*parts}) | {joined}
        return names

    def _joined_biases(self, weights: Weights) -> dict[str, list[str]]:
        """Of the linears that a file multiplies as one: the name of their bias and of the parts it is made of."""
        groups = linear_inputs(self.checkpoint.config)
        fused = [group for group in groups if is_fused(group, self.precision, weights.names)]
        return {f"{group.name}.bias": [f"{linear}.bias" for linear in group.linears] for group in fused}

    def _plain(self, weights: Weights, name: str) -> list[str]:
        found = weights.array(name)
        dtype = np.dtype("float16" if self.precision in HALF_PRECISIONS else "float32")
        parts = self._joined_biases(weights).get(name)
        expected = np.concatenate([*map(self._original, parts)]) if parts else self._due(name)
        if expected.ndim == 2 and name not in (*_TABLES, "embed.weight"):
            expected = expected.T
        if found.dtype != dtype or found.shape != expected.shape:
            return [f"{name}: expected {dtype} {list(expected.shape)}, found {found.dtype} {list(found.shape)}"]
        if name in _TABLES:
            error = float(np.abs(found.astype(np.float32) - expected).max())
            sentence = f"{name}: differs from position x theta^(-2j/head_dim) by up to {error:.3g}"
            return [] if error <= _TABLE_ERROR[str(dtype)] else [sentence]
        return [*self._differences(name, found, expected)]

    def _differences(self, name: str, found: Array, expected: Array) -> Iterator[str]:
        count, largest, example = 0, 0.0, ""
        for start in range(0, len(found), _ROWS):
            rows = slice(start, start + _ROWS)
            due = expected[rows].astype(found.dtype)
            wrong = found[rows] != due
            if wrong.any():
                error = np.abs(found[rows].astype(np.float64) - due)
                worst = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
                count += int(wrong.sum())
                if not float(error[worst]) <= largest:
                    largest = float(error[worst])
                    place = [int(worst[0]) + start, *map(int, worst[1:])]
                    example = f"at {place} expected {due[worst]:.6g}, found {found[rows][worst]:.6g}"
        self.different += count
        if count:
            yield f"{name}: {count} of {found.size} values differ from the checkpoint's, {example}"

    def _groups(self, graph: str, weights: Weights) -> Iterator[str]:
        for group in linear_inputs(self.checkpoint.config):
            if graph == "head" and group.name != HEAD:
                continue
            folded = FoldedGroup(group, self.checkpoint, self.precision, weights)
            if not weights.names.issuperset(folded.names):
                continue  # said to be missing
            yield from self._once((group.name, *map(weights.identity, folded.names)), lambda it=folded: self._fold(it))

    def _fold(self, folded: FoldedGroup) -> list[str]:
        problems, worst = folded.check(self.rounding)
        self.deviation = max(self.deviation, worst)
        return problems

    def _differing_scalars(self, graph: str, weights: Weights) -> Iterator[str]:
        for name in sorted(name for name in weights.names if name.endswith((".input_scale", ".input_shift"))):
            value = weights.array(name)
            if not (value.size == 1 and value.dtype == np.float32 and np.isfinite(value).all()):
                yield f"{name}: expected one finite float32, found {value.dtype} {value.tolist()!r:.60}"
            elif name.endswith("scale") and not value > 0:
                yield f"{name}: expected a scale above 0, found {value.item():.6g}"
            first, known = self._scalars.setdefault(name, (graph, value.tobytes()))
            if known != value.tobytes():
                due = np.frombuffer(known, value.dtype)
                yield f"{name} is {value.item():.6g}, in {first} it is {due.item():.6g}: the graphs must share one"

    def _due(self, name: str) -> Array:
        return self._table(name) if name in _TABLES else self._original(name)

    def _original(self, name: str) -> Array:
        tensors = self.checkpoint.tensors
        # A tied head is the embedding.
        return tensors[name if name in tensors else "embed.weight"].numpy()

    def _table(self, name: str) -> Array:
        config = self.checkpoint.config
        tables = rope_tables(config.max_position_embeddings, config.head_dim, config.rope_theta)
        return tables[_TABLES.index(name)].numpy()
