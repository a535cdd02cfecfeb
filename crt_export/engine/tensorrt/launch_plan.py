"""The layout of a launch: which address and shape TensorRT gets for every tensor, what is copied before and after.

TensorRT wants addresses that are multiples of 256 bytes (``IExecutionContext::setTensorAddress``). A tensor begins
at one, but the rows in the middle of a batch may not: those go through a staging buffer of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.engine.base import BufferSlice
from crt_export.engine.tensorrt.calls import EngineTensor
from crt_export.engine.tensorrt.memory import DeviceMemory
from crt_export.errors import ContractError, problem_list

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Copy:
    """``size`` bytes within the device."""

    target: int
    source: int
    size: int


@dataclass(frozen=True)
class LaunchPlan:
    """What one launch sets and copies; valid as long as no tensor moves.

    Attributes:
        shapes: Input name to shape.
        addresses: Tensor name to the address that TensorRT gets.
        copies_in: From rows to their staging buffers, before the run.
        copies_out: From staging buffers to rows, after the run.
        in_place: Address and size of the rows that are updated in place.
        staging: Keeps the staging buffers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    copies_in: tuple[Copy, ...]
    copies_out: tuple[Copy, ...]
    in_place: tuple[tuple[int, int], ...]
    staging: tuple[StagingBuffer, ...]


class StagingBuffer:
    """Aligned device memory that stands in for rows that are not."""

    def __init__(self, memory: DeviceMemory, size: int) -> None:
        self.address = memory.allocate(size, self)


def plan_launch(
    tensors: Sequence[EngineTensor],
    inputs: Mapping[str, BufferSlice],
    outputs: Mapping[str, BufferSlice],
    memory: DeviceMemory,
    *,
    label: str,
) -> LaunchPlan:
    """Check what is bound and lay out the launch.

    Raises:
        ContractError: A tensor is missing, unknown, of another dtype, or of a shape outside the engine's range;
            a cache is not updated in place; another output shares memory with any tensor. Lists every problem.
    """
    problems = [*_name_problems(tensors, inputs, outputs)]
    if not problems:
        problems = [*_shape_problems(tensors, inputs, outputs), *_memory_problems(tensors, inputs, outputs)]
    if problems:
        raise ContractError(problem_list(f"{label}: the bound tensors", problems))
    bound = {**inputs, **outputs}
    staged = {
        name: StagingBuffer(memory, _size(rows)) for name, rows in inputs.items() if rows.address % ALIGNMENT != 0
    }
    for tensor in tensors:
        name = tensor.spec.name
        if tensor.alias in staged:
            staged[name] = staged[tensor.alias]
        elif not tensor.is_input and bound[name].address % ALIGNMENT != 0:
            staged[name] = StagingBuffer(memory, _size(bound[name]))
    addresses = {name: staged[name].address if name in staged else rows.address for name, rows in bound.items()}
    return LaunchPlan(
        shapes={name: rows.shape for name, rows in inputs.items()},
        addresses=addresses,
        copies_in=tuple(Copy(staged[n].address, inputs[n].address, _size(inputs[n])) for n in inputs if n in staged),
        copies_out=tuple(
            Copy(outputs[n].address, staged[n].address, _size(outputs[n])) for n in outputs if n in staged
        ),
        in_place=tuple((inputs[t.alias].address, _size(inputs[t.alias])) for t in tensors if t.alias),
        staging=tuple(staged.values()),
    )


def _size(rows: BufferSlice) -> int:
    return math.prod(rows.shape) * rows.buffer.dtype.itemsize


def _name_problems(
    tensors: Sequence[EngineTensor], inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
) -> Iterator[str]:
    for side, given, known in (
        ("input", inputs, [t.spec.name for t in tensors if t.is_input]),
        ("output", outputs, [t.spec.name for t in tensors if not t.is_input]),
    ):
        yield from (f"{side} {name} is missing" for name in known if name not in given)
        yield from (f"{name} is no {side} of the engine" for name in given if name not in known)


def _shape_problems(
    tensors: Sequence[EngineTensor], inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
) -> Iterator[str]:
    for tensor in tensors:
        name = tensor.spec.name
        rows = inputs[name] if tensor.is_input else outputs[name]
        if rows.buffer.dtype != np.dtype(tensor.spec.dtype):
            yield f"{name} must be {tensor.spec.dtype}, found {rows.buffer.dtype}"
        if not _fits(tensor, rows.shape):
            limits = f"{list(tensor.least)} to {list(tensor.most)}" if tensor.is_input else f"{list(tensor.spec.dims)}"
            yield f"{name} must have shape {limits}, found {list(rows.shape)}"


def _fits(tensor: EngineTensor, shape: tuple[int, ...]) -> bool:
    if len(shape) != len(tensor.spec.dims):
        return False
    if tensor.is_input:
        return all(low <= size <= high for low, size, high in zip(tensor.least, shape, tensor.most, strict=True))
    return all(dim in (-1, size) for dim, size in zip(tensor.spec.dims, shape, strict=True))


def _memory_problems(
    tensors: Sequence[EngineTensor], inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
) -> Iterator[str]:
    """Caches share their input's memory; what any other output writes is read and written by nobody else."""
    for tensor in tensors:
        if tensor.alias and outputs[tensor.spec.name].address != inputs[tensor.alias].address:
            yield f"{tensor.spec.name} must be at the address of {tensor.alias}, which it updates in place"
    taken = [*inputs.items(), *((t.spec.name, outputs[t.spec.name]) for t in tensors if t.alias)]
    for tensor in tensors:
        if not tensor.is_input and not tensor.alias:
            rows = outputs[tensor.spec.name]
            yield from (f"{tensor.spec.name} shares memory with {name}" for name, r in taken if _overlap(rows, r))
            taken.append((tensor.spec.name, rows))


def _overlap(one: BufferSlice, other: BufferSlice) -> bool:
    return one.address < other.address + _size(other) and other.address < one.address + _size(one)
