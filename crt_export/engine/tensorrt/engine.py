"""TensorRT (10.16 or newer, 11.x) and TensorRT-RTX behind the engine protocol; needs no torch.

The session above allocates its tensors here and binds them. A step is captured into a CUDA graph, one per set of
tensors, so its launches cost one call each; a prefill, whose shapes differ from call to call, is enqueued.

Kernels that TensorRT-RTX compiled on this machine are kept in the user's cache folder for the next process. Nothing
depends on it: a cache that cannot be read, is damaged or does not fit is as good as none, and one that cannot be
written is lost. A damaged file never reaches the runtime: it begins with the hash of what follows.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_export.engine.base import Buffer, BufferSlice, Launch
from crt_export.engine.tensorrt import api
from crt_export.engine.tensorrt.api import (
    Api,
    EngineTensor,
    ICudaEngine,
    IExecutionContext,
    Log,
    Runtime,
    logger_from_log,
)
from crt_export.engine.tensorrt.device import CudaDevice
from crt_export.engine.tensorrt.launch import CapturedLaunch, LaunchPlan, PlainLaunch, StreamContext, plan_launch
from crt_export.engine.tensorrt.memory import DeviceMemory, DeviceResources, DeviceTensor
from crt_export.engine.tensorrt.sidecar import EngineFacts, EngineFile, read_sidecar
from crt_export.environment import find_dependency, run_obstacles
from crt_export.errors import ContractError, MissingDependencyError, UnsupportedError, problem_list
from crt_export.folders import user_cache
from crt_export.machine import Gpu, list_gpus
from crt_export.profile import EngineProfile
from crt_export.spec import GraphSpec, interface_problems, same_sizes
from crt_export.user_files import read_input, write_file

_MAGIC = b"crt-export tensorrt-rtx cache 1\n"
#: As in the C++ library.
_MOST_BYTES = 2**30
_HASH_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where engines run.

    Attributes:
        api: The module ``tensorrt`` or ``tensorrt_rtx``.
        device: The GPU's memory and streams.
        gpu: Its name and architecture.
    """

    api: Api
    device: CudaDevice
    gpu: Gpu


class TensorRTProgram:
    """One deserialised engine, with the runtime it needs to live; see :class:`crt_export.engine.base.Program`.

    An execution context may serve one thread at a time and one captured graph, and it holds scratch memory. So a graph
    keeps its context, with a stream of its own, as long as it lives, and a plain launch borrows one for a call.

    Attributes:
        inputs: What it reads, as its sidecar says; ``outputs`` likewise.
        most: Largest shape per input.
        memory: The device's memory.
        free: Contexts that nobody uses: those whose launches are captured, and those whose are not.
        log: What TensorRT complained about.
        label: What to call it in messages.
    """

    def __init__(
        self, machine: Machine, file: EngineFile, facts: EngineFacts, profile: EngineProfile, memory: DeviceMemory
    ) -> None:
        """Load the plan and compare what came out with its sidecar.

        Raises:
            BundleError: The plan is not what was built.
            ContractError: TensorRT does not load the engine, or it is not what its sidecar says.
        """
        self.label = f"{profile.name} {file.graph}"
        self.inputs, self.outputs, self.most = facts.contract.inputs, facts.contract.outputs, facts.most
        self.memory, self.log = memory, Log(most=10)
        self.free: dict[bool, list[StreamContext]] = {True: [], False: []}
        self._lock = threading.Lock()
        self._api = machine.api
        self._rtx = profile.runtime == "tensorrt-rtx"
        plan = file.read_plan()
        # TensorRT wants its objects destroyed in the reverse order: contexts, engine, runtime, logger.
        self._logger = logger_from_log(machine.api, self.log)
        self._runtime: Runtime = api.create_runtime(
            machine.api, self._logger, version_compatible=profile.version_compatible
        )
        self._engine: ICudaEngine = self._deserialized(plan, file)
        self._tensors = api.tensors_of_engine(machine.api, self._engine)
        problems = [*_engine_problems(self._tensors, facts)]
        if problems:
            raise ContractError(problem_list(f"{file.path}: the engine is not what its sidecar says", problems))
        self._configs: dict[bool, Any] = {}
        self._cache: Any = None
        if self._rtx:
            self._open_cache(f"{machine.api.__version__}/{hashlib.sha256(plan).hexdigest()[:32]}")

    def bind(
        self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
    ) -> Launch:
        """Fix the memory of every input and output; a repeated launch becomes a CUDA graph.

        Raises:
            ContractError: The engine does not take these tensors; lists every problem.
        """
        return (CapturedLaunch if repeated else PlainLaunch)(self, dict(inputs), dict(outputs))

    def plan(self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]) -> LaunchPlan:
        """The layout of a launch, from where its tensors are now."""
        return plan_launch(self._tensors, inputs, outputs, self.memory, label=self.label)

    def borrow(self, *, captured: bool) -> StreamContext:
        """A context that nobody else uses until it is back in ``free``.

        Args:
            captured: Whether its launches become CUDA graphs.

        Raises:
            ContractError: The engine is closed, or TensorRT makes no further context.
        """
        self.memory.resources.require_open()
        with self._lock:
            if self.free[captured]:
                return self.free[captured].pop()
            execution = self._create_context(captured)
        if execution is None:
            raise ContractError(
                f"{self.label}: no execution context, most often for lack of GPU memory: close other sessions, or "
                "build with a smaller --capacity"
            )
        context = StreamContext(execution, self.memory.device.create_stream())
        self.memory.resources.attach(context, self.memory.device.free_stream, context.stream)
        return context

    def capturable(self, context: StreamContext) -> bool:
        """Whether TensorRT lets a run in this context be captured; only TensorRT-RTX can be asked."""
        return not self._rtx or api.stream_capturable_rtx(context.execution, context.stream)

    def close(self) -> None:
        """Keep the compiled kernels for the next process, then destroy contexts, engine and runtime, in this order."""
        for contexts in self.free.values():
            contexts.clear()
        if self._cache is not None:
            self._save()
        self._cache = None
        self._configs.clear()
        self._engine = None
        self._runtime = None

    def _create_context(self, captured: bool) -> IExecutionContext | None:
        if not self._rtx:
            return api.create_context(self._engine)
        if captured not in self._configs:
            self._configs[captured] = api.context_config_rtx(self._api, self._engine, self._cache, captured=captured)
        return api.create_context_rtx(self._engine, self._configs[captured])

    def _deserialized(self, plan: bytes, file: EngineFile) -> ICudaEngine:
        engine = api.deserialize_engine(self._runtime, plan)
        if engine is None:
            reason, name = self.log.take_errors(), "TensorRT"
            if self._rtx:
                reason, name = f"{reason}; {api.plan_validity_rtx(self._runtime, plan)}", "TensorRT-RTX"
            raise ContractError(
                f"{file.path}: {name} {self._api.__version__} cannot load this engine of {len(plan):,} bytes "
                f"({reason}); build the bundle again on this machine"
            )
        return engine

    def _open_cache(self, name: str) -> None:
        path = cache_path(name)
        self._cache = api.runtime_cache_rtx(self._engine, read_cache(path))
        self.log.take_errors()  # what a cache that does not fit made it say

        def save(cache: Any) -> None:
            write_cache(path, api.content_of_runtime_cache_rtx(cache))

        # Also where the application ends without closing: what was compiled once should not be compiled again.
        self._save = weakref.finalize(self, save, self._cache)


def _engine_problems(tensors: tuple[EngineTensor, ...], facts: EngineFacts) -> Iterator[str]:
    """What the loaded engine and its sidecar disagree about."""
    sides = ([tensor.spec for tensor in tensors if tensor.is_input is wanted] for wanted in (True, False))
    inputs, outputs = map(tuple, sides)
    loaded = GraphSpec(name=facts.contract.name, inputs=inputs, outputs=outputs, aliases=())
    yield from interface_problems(facts.contract, loaded, same_sizes)
    aliases = dict(facts.contract.aliases)
    for tensor in tensors:
        name, shapes = tensor.spec.name, (tensor.least, tensor.most)
        if tensor.is_input and name in facts.least and shapes != (facts.least[name], facts.most[name]):
            yield (
                f"{name} must take shapes {list(facts.least[name])} to {list(facts.most[name])}, "
                f"found {list(tensor.least)} to {list(tensor.most)}"
            )
        if tensor.alias != aliases.get(name, ""):
            yield f"{name} must share memory with {aliases.get(name, 'nothing')}, found {tensor.alias!r}"


class TensorRTEngine:
    """The engines of one target; see :class:`crt_export.engine.base.Engine`."""

    host_memory = False
    one_graph = False

    def __init__(self, machine: Machine, files: Mapping[str, EngineFile], profile: EngineProfile) -> None:
        """Check and load every engine.

        Args:
            machine: Where they run.
            files: Graph name to engine, ``step`` and ``prefill`` at least.
            profile: The target's profile, as the bundle's manifest has it.

        Raises:
            BundleError: A sidecar is damaged or belongs to something else.
            MissingDependencyError: An engine needs another version of the runtime or another GPU.
            ContractError: TensorRT does not load an engine, or the engine is not what its sidecar says.
        """
        self._name = profile.name
        self._resources = DeviceResources()
        version = machine.api.__version__
        facts = {graph: read_sidecar(file, profile, machine.gpu, version) for graph, file in files.items()}
        with ExitStack() as unless_loaded:
            unless_loaded.callback(self._resources.close)
            self._memory = DeviceMemory(machine.device, self._resources)
            self._programs = {
                graph: TensorRTProgram(machine, file, facts[graph], profile, self._memory)
                for graph, file in files.items()
            }
            unless_loaded.pop_all()
        prefill, step = self._programs["prefill"].most, self._programs["step"].most
        self.max_tokens: int = prefill["input_ids"][1]
        self.max_batch: int | None = min(prefill["input_ids"][0], step["input_ids"][0])
        self.fixed_capacity: int | None = profile.capacity

    def program(self, graph: str) -> TensorRTProgram:
        """The loaded engine of this graph.

        Raises:
            UnsupportedError: The target was compiled without it.
        """
        if graph not in self._programs:
            others = ", ".join(self._programs)
            passes = (
                ": run the number of passes it was compiled with (passes=None), or build with another --unroll"
                if graph == "prefill_pass"
                else ""
            )
            raise UnsupportedError(f"{self._name} has no {graph} engine, only {others}{passes}")
        return self._programs[graph]

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New zeroed device memory."""
        return DeviceTensor(self._memory, shape, dtype)

    def close(self) -> None:
        """Free everything on the device: graphs, tensors, contexts and engines; closing twice is harmless."""
        if not self._resources.closed:
            self._resources.close()
            for program in self._programs.values():
                program.close()


def machine_of_profile(profile: EngineProfile) -> Machine:
    """The runtime and the GPU that a target needs, of this machine.

    Raises:
        MissingDependencyError: A package or the GPU is absent; names all that is.
    """
    devices = list_gpus()
    obstacles = run_obstacles(profile, devices)
    if obstacles:
        raise MissingDependencyError(problem_list(f"running {profile.name} needs what this machine lacks", obstacles))
    module = find_dependency(profile.runtime).module
    try:
        api: Any = importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"running {profile.name}: {module} cannot be imported ({error})") from error
    return Machine(api=api, device=CudaDevice(), gpu=devices[0])


def cache_path(name: str) -> Path | None:
    """Where the cache of this name lies: in $XDG_CACHE_HOME or ~/.cache; None where there is no home folder."""
    folder = user_cache("tensorrt-rtx")
    return None if folder is None else folder / f"{name}.cache"


def read_cache(path: Path | None) -> bytes | None:
    """What :func:`write_cache` wrote; None if there is nothing or it is damaged."""
    if path is None:
        return None
    try:
        content = read_input(path, most=_MOST_BYTES)
    except OSError:
        return None
    head, body = content[: len(_MAGIC) + _HASH_BYTES], content[len(_MAGIC) + _HASH_BYTES :]
    return body if head == _MAGIC + hashlib.sha256(body).digest() else None


def write_cache(path: Path | None, body: bytes) -> bool:
    """Replace the file in one step, readable by its owner only; False if that was not possible or not needed."""
    if path is None or not body or read_cache(path) == body:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(path, _MAGIC + hashlib.sha256(body).digest() + body, mode=0o600)
    except OSError:
        return False
    return True
