"""Runs of an engine: enqueued anew on every call, or captured once into a CUDA graph and launched from then on.

An execution context may serve one thread at a time and one captured graph, and it holds scratch memory. So a graph
keeps its context, with a stream of its own, as long as it lives, and a plain launch borrows one for a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from crt_export.engine.base import BufferSlice
from crt_export.engine.tensorrt.api import IExecutionContext, Log
from crt_export.engine.tensorrt.calls import enqueue, set_tensors
from crt_export.engine.tensorrt.device import Device
from crt_export.engine.tensorrt.launch_plan import LaunchPlan, StagingBuffer
from crt_export.engine.tensorrt.memory import DeviceMemory, DeviceResources
from crt_export.errors import ContractError, problem_list


@dataclass
class StreamContext:
    """A context and the stream that its runs are enqueued on."""

    execution: IExecutionContext
    stream: int


class StreamContexts:
    """The contexts of one engine that are captured, or of those that are not."""

    def __init__(
        self, create: Callable[[], IExecutionContext | None], device: Device, resources: DeviceResources, *, label: str
    ) -> None:
        self._create = create
        self._device = device
        self._resources = resources
        self._label = label
        self._free: list[StreamContext] = []
        self._lock = threading.Lock()

    def borrow(self) -> StreamContext:
        """A context that nobody else uses until it is given back.

        Raises:
            ContractError: TensorRT makes no further context.
        """
        self._resources.require_open()
        with self._lock:
            if self._free:
                return self._free.pop()
            execution = self._create()
        if execution is None:
            raise ContractError(
                f"{self._label}: no execution context, most often for lack of GPU memory: close other sessions, or "
                "build with a smaller --capacity"
            )
        context = StreamContext(execution, self._device.create_stream())
        self._resources.attach(context, self._device.free_stream, context.stream)
        return context

    def give_back(self, context: StreamContext) -> None:
        """Let others use the context; nothing of it runs any more. May be called while Python collects garbage."""
        self._free.append(context)

    def close(self) -> None:
        """Destroy the contexts that nobody holds: they must go before their engine."""
        self._free.clear()


#: Lays out a launch from where its tensors are now.
Planner = Callable[[Mapping[str, BufferSlice], Mapping[str, BufferSlice]], LaunchPlan]


@dataclass(frozen=True)
class LaunchTools:
    """What the launches of one engine share.

    Attributes:
        memory: The device's memory.
        plan: Lays out a launch.
        contexts: Contexts for this kind of launch.
        capturable: Whether a run of a context can be captured.
        log: What TensorRT complained about.
        label: What to call the engine in messages.
    """

    memory: DeviceMemory
    plan: Planner
    contexts: StreamContexts
    capturable: Callable[[StreamContext], bool]
    log: Log
    label: str


class PlainLaunch:
    """Enqueues the engine on every call, in a context borrowed for the call: for prefills, whose shapes change."""

    def __init__(
        self, tools: LaunchTools, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
    ) -> None:
        """Lay the launch out; raises ContractError for tensors the engine does not take."""
        self._tools = tools
        self._tensors = (inputs, outputs)  # keeps the memory
        self._plan = tools.plan(inputs, outputs)

    def __call__(self) -> None:
        """Run once and wait for the result.

        Raises:
            ContractError: TensorRT or CUDA refused or failed.
        """
        context = self._tools.contexts.borrow()
        # A context whose run failed is not given back: what it holds is unknown.
        _set_tensors(self._tools, context, self._plan)
        _run_to_end(self._tools, context, lambda: _enqueue(self._tools, context, self._plan))
        self._tools.contexts.give_back(context)


class CapturedLaunch:
    """Launches a CUDA graph, captured on the first call and again after a tensor has moved: for steps.

    Capturing needs a run before it, in which TensorRT prepares itself. That run also updates the caches in place,
    so they are saved before it and put back after it.
    """

    def __init__(
        self, tools: LaunchTools, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]
    ) -> None:
        """Lay the launch out; raises ContractError for tensors the engine does not take."""
        self._tools = tools
        self._tensors = (inputs, outputs)
        self._rows = [*inputs.values(), *outputs.values()]
        self._place = self._current_place()
        self._plan = tools.plan(inputs, outputs)
        self._captured: Captured | None = None

    def __call__(self) -> None:
        """Run once and wait for the result.

        Raises:
            ContractError: TensorRT or CUDA refused or failed.
        """
        tools = self._tools
        tools.memory.resources.require_open()
        place = self._current_place()
        if place != self._place:
            self._captured = None
            self._plan = tools.plan(*self._tensors)
            self._place = place
        captured, self._captured = self._captured, None  # a graph that fails is captured anew
        if captured is None:
            captured = capture(tools, self._plan)
        graph, context = captured.graph, captured.context
        _run_to_end(tools, context, lambda: tools.memory.device.launch_graph(graph, context.stream))
        self._captured = captured

    def _current_place(self) -> list[tuple[int, tuple[int, ...]]]:
        """Where every tensor is and how large: all that a captured graph depends on."""
        return [(rows.buffer.address, rows.buffer.shape) for rows in self._rows]


class Captured:
    """A graph, the context it was captured in, and the memory it writes besides the session's."""

    def __init__(
        self, tools: LaunchTools, context: StreamContext, graph: int, staging: tuple[StagingBuffer, ...]
    ) -> None:
        self.context = context
        self.graph = graph
        self._staging = staging
        tools.memory.resources.attach(self, _retire, tools.memory.device, tools.contexts, context, graph)


def _retire(device: Device, contexts: StreamContexts, context: StreamContext, graph: int) -> None:
    device.free_graph(graph)
    contexts.give_back(context)


def capture(tools: LaunchTools, plan: LaunchPlan) -> Captured:
    """Warm a context up without leaving a trace in the caches, then capture a run of it.

    Raises:
        ContractError: TensorRT or CUDA refused or failed.
    """
    device, context = tools.memory.device, tools.contexts.borrow()
    _set_tensors(tools, context, plan)
    _warm_up(tools, context, plan)
    if not tools.capturable(context):
        raise ContractError(f"{tools.label}: TensorRT says that this engine cannot be captured into a CUDA graph")
    with tools.memory.resources.deferred():
        device.begin_capture(context.stream)
        with ExitStack() as undo:
            undo.callback(device.abandon_capture, context.stream)
            _enqueue(tools, context, plan)
            undo.pop_all()
        graph = device.end_capture(context.stream)
    return Captured(tools, context, graph, plan.staging)


def _warm_up(tools: LaunchTools, context: StreamContext, plan: LaunchPlan) -> None:
    """Run once; every tensor that is updated in place is as it was before, also after a failure to run."""
    device = tools.memory.device
    saved = [(StagingBuffer(tools.memory, size), address, size) for address, size in plan.in_place]
    for scratch, address, size in saved:
        device.copy(scratch.address, address, size, context.stream)
    try:
        _enqueue(tools, context, plan)
    finally:
        for scratch, address, size in saved:
            device.copy(address, scratch.address, size, context.stream)
        device.synchronize(context.stream)


def _run_to_end(tools: LaunchTools, context: StreamContext, run: Callable[[], None]) -> None:
    """Enqueue and wait, also where an interrupt comes between: what is cleared or freed next must not be in use."""
    try:
        run()
    finally:
        tools.memory.device.synchronize(context.stream)


def _set_tensors(tools: LaunchTools, context: StreamContext, plan: LaunchPlan) -> None:
    refused = set_tensors(context.execution, plan.shapes, plan.addresses)
    if refused:
        raise ContractError(problem_list(f"{tools.label}: TensorRT refused ({tools.log.take_errors()})", refused))


def _enqueue(tools: LaunchTools, context: StreamContext, plan: LaunchPlan) -> None:
    device = tools.memory.device
    for copy in plan.copies_in:
        device.copy(copy.target, copy.source, copy.size, context.stream)
    if not enqueue(context.execution, context.stream):
        raise ContractError(f"{tools.label}: TensorRT did not run the engine ({tools.log.take_errors()})")
    for copy in plan.copies_out:
        device.copy(copy.target, copy.source, copy.size, context.stream)
