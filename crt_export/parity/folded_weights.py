"""The linears that read one activation, quantised, together with what produces it: one set of smoothing factors."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.parity.quantized_weights import (
    BlockWeight,
    ColumnWeight,
    StoredWeight,
    deviation,
    folded_exponents,
)
from crt_export.quantize.linears import HEAD, LinearInput, linear_inputs

Floats = NDArray[np.float32]
#: A bias with a folded shift is a sum in float64, rounded to float32 once.
_BIAS_ERROR = 1e-6


class Arrays(Protocol):
    """Initializers by name."""

    @property
    def names(self) -> frozenset[str]: ...

    def array(self, name: str) -> NDArray[Any]: ...


def folded_names(config: ModelConfig, precision: str, graph: str, stored: Set[str]) -> set[str]:
    """Initializers of the INT8 linears of one graph and of what is folded into them; none in other precisions.

    Args:
        config: The model.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        stored: Names the file has, which say how it stores linears that read one activation.
    """
    if precision not in ("w8", "w8a8"):
        return set()
    groups = [group for group in linear_inputs(config) if graph != "head" or group.name == HEAD]
    names: set[str] = set()
    for group in groups:
        names.update(_norm_names(group))
        for linear in (group.name,) if is_fused(group, precision, stored) else group.linears:
            names.update(_parts(linear, group, config, precision))
    return names


def is_fused(group: LinearInput, precision: str, stored: Set[str]) -> bool:
    """Whether a file multiplies the linears of an activation as one, under the activation's name (``w8`` may)."""
    return precision == "w8" and len(group.linears) > 1 and f"{group.name}.weight_blocks" in stored


def _norm_names(group: LinearInput) -> tuple[str, ...]:
    return (f"{group.norm}.weight", f"{group.norm}.bias") if group.norm is not None else ()


def _parts(linear: str, group: LinearInput, config: ModelConfig, precision: str) -> tuple[str, ...]:
    if precision == "w8":
        return (f"{linear}.weight_blocks", f"{linear}.weight_scales")
    bias = () if linear == HEAD and config.tie_word_embeddings else (f"{linear}.bias_fp32",)
    return (f"{linear}.weight_q", f"{linear}.weight_scale", f"{group.name}.input_scale", *bias)


def value_factors(checkpoint: Checkpoint, precision: str, weights: Arrays) -> tuple[Floats, ...]:
    """What a graph divides the values in its cache by, per layer float32 [heads, 1, head_dim]; ones but for ``w8a8``.

    Smoothing lets v and o trade scale, so the cache of a ``w8a8`` graph holds smoothed values. They are recovered from
    the graph's own weights; whether v and o carry the same factor is for the contract level to say.
    """
    config = checkpoint.config
    shape = (config.num_attention_heads, 1, config.head_dim)
    factors = []
    for group in (group for group in linear_inputs(config) if group.producer is not None):
        folded = FoldedGroup(group, checkpoint, precision, weights)
        usable = precision == "w8a8" and weights.names.issuperset(folded.names)
        factors.append((folded.factor() if usable else np.ones(config.hidden_size, np.float32)).reshape(shape))
    return tuple(factors)


class FoldedGroup:
    """One activation with its readers, and for v and o of a ``w8a8`` layer the two groups that share a factor."""

    def __init__(self, group: LinearInput, checkpoint: Checkpoint, precision: str, weights: Arrays) -> None:
        self._group, self._checkpoint, self._precision, self._weights = group, checkpoint, precision, weights
        self._groups = {linear: other for other in linear_inputs(checkpoint.config) for linear in other.linears}
        # v carries o's factor in its columns, so both groups are needed to judge either.
        self._reader = self._reader_of(group)
        involved = [group, *([self._reader] if self._reader else [])]
        if precision == "w8a8" and group.producer is not None:
            involved.append(self._groups[group.producer])
        names = [name for other in involved for name in self._names(other)]
        self.names = tuple(dict.fromkeys(names))

    def factor(self) -> Floats:
        """What smoothing divided the channels of the activation by, float32 [channels]."""
        return self._factor(self._group)[0]

    def check(self, limit: float) -> tuple[list[str], float]:
        """Sentences on what is wrong, and the largest distance of a weight in quantisation steps, at most ``limit``."""
        factor, problems = self._factor(self._group)
        worst = 0.0
        for linear in self._group.linears:
            divisor = None
            if self._reader is not None and self._reader.producer == linear:
                divisor, _ = self._factor(self._reader)  # its own group reports what is wrong with it
            original = self._original(linear, "weight")
            distance, problem = deviation(self._stored(linear), original, factor, divisor, limit=limit)
            worst = max(worst, distance)
            if problem:
                problems.append(f"weight {linear}: {problem}")
            if self._precision == "w8a8":
                problems += self._bias_problems(linear, divisor)
        return problems, worst

    def _names(self, group: LinearInput) -> tuple[str, ...]:
        config = self._checkpoint.config
        linears = (group.name,) if self._fused(group) else group.linears
        parts = [name for linear in linears for name in _parts(linear, group, config, self._precision)]
        shift = f"{group.name}.input_shift"
        return (*_norm_names(group), *parts, *([shift] if shift in self._weights.names else []))

    def _fused(self, group: LinearInput) -> bool:
        return is_fused(group, self._precision, self._weights.names)

    def _reader_of(self, group: LinearInput) -> LinearInput | None:
        if self._precision != "w8a8":
            return None
        return next((other for other in self._groups.values() if other.producer in group.linears), None)

    def _factor(self, group: LinearInput) -> tuple[Floats, list[str]]:
        """What smoothing multiplied each channel of the group's weights by, and what is not explained by any factor."""
        channels = self._original(group.linears[0], "weight").shape[1]
        if group.norm is not None:
            sources = [(f"{group.norm}.{part}", self._tensor(f"{group.norm}.{part}")) for part in ("weight", "bias")]
        elif group.producer is not None and self._precision == "w8a8":
            sources = [(f"{group.producer}.bias_fp32", self._tensor(f"{group.producer}.bias"))]
        else:
            return np.ones(channels, np.float32), []
        dtype = np.float16 if self._precision == "w8a8" and group.norm is not None else np.float32
        pairs = [(original, self._weights.array(name)) for name, original in sources]
        for (name, original), (_, found) in zip(sources, pairs, strict=True):
            if found.dtype != dtype or found.shape != original.shape:
                expected = f"{np.dtype(dtype)} {list(original.shape)}"
                problem = f"{name}: expected {expected}, found {found.dtype} {list(found.shape)}"
                return np.ones(channels, np.float32), [problem]
        exponents, explained = folded_exponents(pairs, lambda some, power: self._cost(group, some, power))
        problems = []
        if not explained.all():
            channel = int((~explained).argmax())
            values = ", ".join(
                f"{name} is {found[channel]:.6g} (checkpoint {original[channel]:.6g})"
                for (name, original), (_, found) in zip(sources, pairs, strict=True)
            )
            problems.append(
                f"{int((~explained).sum())} of {channels} channels are not the checkpoint's divided by one power of "
                f"two, such as channel {channel}: {values}"
            )
        return np.exp2(exponents).astype(np.float32), problems

    def _cost(self, group: LinearInput, channels: NDArray[np.intp], exponent: int) -> Floats:
        """Largest distance, in steps, of some channels of the readers (and of the producer) under a factor."""
        power = np.float32(2.0**exponent)
        costs = []
        for linear in group.linears:
            values, step, _ = self._stored(linear).part(slice(None), channels)
            costs.append(_largest_distance(values, self._original(linear, "weight")[:, channels] * power, step, 0))
        if group.producer is not None:
            factor, _ = self._factor(self._groups[group.producer])
            due = self._original(group.producer, "weight")[channels] * factor / power
            values, step, _ = self._stored(group.producer).part(slice(None), slice(None))
            costs.append(_largest_distance(values[channels], due, step[channels], 1))
        return np.max(costs, axis=0)

    def _stored(self, linear: str) -> StoredWeight:
        array = self._weights.array
        if self._precision == "w8":
            out, into = self._original(linear, "weight").shape
            group = self._groups[linear]
            name, first = (group.name, group.linears.index(linear) * out) if self._fused(group) else (linear, 0)
            blocks, scales = array(f"{name}.weight_blocks"), array(f"{name}.weight_scales")
            outs = slice(first, first + out)
            return BlockWeight(blocks=blocks[outs], scales=scales[outs], into=into)
        integers, scales = array(f"{linear}.weight_q"), array(f"{linear}.weight_scale")
        return ColumnWeight(integers=integers, scales=scales)

    def _bias_problems(self, linear: str, divisor: Floats | None) -> list[str]:
        name = f"{linear}.bias_fp32"
        if name not in self._weights.names:
            return []
        due = self._original(linear, "bias").astype(np.float64)
        if divisor is not None:
            due = due / divisor
        shift = f"{self._group.name}.input_shift"
        if shift in self._weights.names:
            stored = self._stored(linear)
            assert isinstance(stored, ColumnWeight)
            due = due + float(self._weights.array(shift)) * stored.column_sums()
        found = self._weights.array(name)
        if found.dtype != np.float32 or found.shape != due.shape:
            return [f"{name}: expected float32 {list(due.shape)}, found {found.dtype} {list(found.shape)}"]
        wrong = ~(np.abs(found - due) <= _BIAS_ERROR * np.abs(due) + 1e-30)
        if not wrong.any():
            return []
        worst = int(wrong.argmax())
        return [
            f"{name}: {int(wrong.sum())} of {len(due)} values differ from the checkpoint's bias plus the folded shift, "
            f"at [{worst}] expected {due[worst]:.6g}, found {found[worst]:.6g}"
        ]

    def _original(self, linear: str, part: str) -> Floats:
        return self._tensor(f"{linear}.{part}")

    def _tensor(self, name: str) -> Floats:
        tensors = self._checkpoint.tensors
        return tensors[name if name in tensors else "embed.weight"].numpy()


def _largest_distance(values: Floats, due: Floats, step: Floats, axis: int) -> Floats:
    """Largest distance in steps along an axis; a step of 0 stands for a block of zeros and decides nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.abs(values - due) / step, nan=0.0, posinf=np.inf).max(axis=axis)
