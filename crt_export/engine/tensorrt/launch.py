"""Runs of an engine: enqueued anew on every call, or captured once into a CUDA graph and launched from then on.

A launch is laid out first: which address and shape TensorRT gets for every tensor, what is copied before and after.
TensorRT wants addresses that are multiples of 256 bytes (``IExecutionContext::setTensorAddress``). A tensor begins at
one, but the rows in the middle of a batch may not: those go through a staging buffer of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crt_export.engine.base import BufferSlice
from crt_export.engine.tensorrt.api import EngineTensor, IExecutionContext, enqueue, set_tensors
from crt_export.engine.tensorrt.memory import DeviceMemory
from crt_export.errors import ContractError, problem_list

if TYPE_CHECKING:
    from crt_export.engine.tensorrt.engine import TensorRTProgram

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


@dataclass
class StreamContext:
    """A context and the stream that its runs are enqueued on."""

    execution: IExecutionContext
    stream: int


class PlainLaunch:
    """Enqueues the engine on every call, in a context borrowed for the call: for prefills, whose shapes change."""

    def __init__(
        self, program: TensorRTProgram, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
    ) -> None:
        """Lay the launch out; raises ContractError for tensors the engine does not take."""
        self._program = program
        self._tensors = (inputs, outputs)  # keeps the memory
        self._plan = program.plan(inputs, outputs)

    def __call__(self) -> None:
        """Run once and wait for the result.

        Raises:
            ContractError: TensorRT or CUDA refused or failed.
        """
        context = self._program.borrow(captured=False)
        # A context whose run failed is not given back: what it holds is unknown.
        _set_tensors(self._program, context, self._plan)
        _run_to_end(self._program, context, lambda: _enqueue(self._program, context, self._plan))
        self._program.free[False].append(context)


class CapturedLaunch:
    """Launches a CUDA graph, captured on the first call and again after a tensor has moved: for steps.

    Capturing needs a run before it, in which TensorRT prepares itself. That run also updates the caches in place,
    so they are saved before it and put back after it.
    """

    def __init__(
        self, program: TensorRTProgram, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
    ) -> None:
        """Lay the launch out; raises ContractError for tensors the engine does not take."""
        self._program = program
        self._tensors = (inputs, outputs)
        self._rows = [*inputs.values(), *outputs.values()]
        self._place = self._current_place()
        self._plan = program.plan(inputs, outputs)
        self._captured: Captured | None = None

    def __call__(self) -> None:
        """Run once and wait for the result.

        Raises:
            ContractError: TensorRT or CUDA refused or failed.
        """
        program = self._program
        program.memory.resources.require_open()
        place = self._current_place()
        if place != self._place:
            self._captured = None
            self._plan = program.plan(*self._tensors)
            self._place = place
        captured, self._captured = self._captured, None  # a graph that fails is captured anew
        if captured is None:
            captured = capture(program, self._plan)
        graph, context = captured.graph, captured.context
        _run_to_end(program, context, lambda: program.memory.device.launch_graph(graph, context.stream))
        self._captured = captured

    def _current_place(self) -> list[tuple[int, tuple[int, ...]]]:
        """Where every tensor is and how large: all that a captured graph depends on."""
        return [(rows.buffer.address, rows.buffer.shape) for rows in self._rows]


class Captured:
    """A graph, the context it was captured in, and the memory it writes besides the session's."""

    def __init__(
        self, program: TensorRTProgram, context: StreamContext, graph: int, staging: tuple[StagingBuffer, ...]
    ) -> None:
        self.context = context
        self.graph = graph
        self._staging = staging
        program.memory.resources.attach(self, _retire, program, context, graph)


def _retire(program: TensorRTProgram, context: StreamContext, graph: int) -> None:
    """Nothing of the context runs any more, and its engine is still there. May be called while garbage is collected."""
    program.memory.device.free_graph(graph)
    program.free[True].append(context)


def capture(program: TensorRTProgram, plan: LaunchPlan) -> Captured:
    """Warm a context up without leaving a trace in the caches, then capture a run of it.

    Raises:
        ContractError: TensorRT or CUDA refused or failed.
    """
    device, context = program.memory.device, program.borrow(captured=True)
    _set_tensors(program, context, plan)
    _warm_up(program, context, plan)
    if not program.capturable(context):
        raise ContractError(f"{program.label}: TensorRT says that this engine cannot be captured into a CUDA graph")
    with program.memory.resources.deferred():
        device.begin_capture(context.stream)
        with ExitStack() as undo:
            undo.callback(device.abandon_capture, context.stream)
            _enqueue(program, context, plan)
            undo.pop_all()
        graph = device.end_capture(context.stream)
    return Captured(program, context, graph, plan.staging)


def _warm_up(program: TensorRTProgram, context: StreamContext, plan: LaunchPlan) -> None:
    """Run once; every tensor that is updated in place is as it was before, also after a failure to run."""
    device = program.memory.device
    saved = [(StagingBuffer(program.memory, size), address, size) for address, size in plan.in_place]
    for scratch, address, size in saved:
        device.copy(scratch.address, address, size, context.stream)
    try:
        _enqueue(program, context, plan)
    finally:
        for scratch, address, size in saved:
            device.copy(address, scratch.address, size, context.stream)
        device.synchronize(context.stream)


def _run_to_end(program: TensorRTProgram, context: StreamContext, run: Callable[[], None]) -> None:
    """Enqueue and wait, also where an interrupt comes between: what is cleared or freed next must not be in use."""
    try:
        run()
    finally:
        program.memory.device.synchronize(context.stream)


def _set_tensors(program: TensorRTProgram, context: StreamContext, plan: LaunchPlan) -> None:
    refused = set_tensors(context.execution, plan.shapes, plan.addresses)
    if refused:
        raise ContractError(problem_list(f"{program.label}: TensorRT refused ({program.log.take_errors()})", refused))


def _enqueue(program: TensorRTProgram, context: StreamContext, plan: LaunchPlan) -> None:
    device = program.memory.device
    for copy in plan.copies_in:
        device.copy(copy.target, copy.source, copy.size, context.stream)
    if not enqueue(context.execution, context.stream):
        raise ContractError(f"{program.label}: TensorRT did not run the engine ({program.log.take_errors()})")
    for copy in plan.copies_out:
        device.copy(copy.target, copy.source, copy.size, context.stream)
