"""TensorRT (10.16 or newer, 11.x) and TensorRT-RTX behind the engine protocol; needs no torch.

The session above allocates its tensors here and binds them. A step is captured into a CUDA graph, one per set of
tensors, so its launches cost one call each; a prefill, whose shapes differ from call to call, is enqueued.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from crt_export.engine.base import Buffer, BufferSlice, Launch
from crt_export.engine.tensorrt.device import CudaDevice
from crt_export.engine.tensorrt.launch import CapturedLaunch, LaunchTools, PlainLaunch, StreamContexts
from crt_export.engine.tensorrt.launch_plan import LaunchPlan, plan_launch
from crt_export.engine.tensorrt.loading import LoadedEngine, Machine
from crt_export.engine.tensorrt.memory import DeviceMemory, DeviceResources, DeviceTensor
from crt_export.engine.tensorrt.sidecar import EngineFile
from crt_export.environment import find_dependency, run_obstacles
from crt_export.errors import MissingDependencyError, UnsupportedError, problem_list
from crt_export.machine import list_gpus
from crt_export.profile import EngineProfile
from crt_export.spec import TensorSpec


class TensorRTProgram:
    """One loaded engine; see :class:`crt_export.engine.base.Program`."""

    def __init__(self, loaded: LoadedEngine, memory: DeviceMemory) -> None:
        """Prepare the contexts for both kinds of launch; none is made yet."""
        self.inputs: tuple[TensorSpec, ...] = loaded.facts.contract.inputs
        self.outputs: tuple[TensorSpec, ...] = loaded.facts.contract.outputs
        self.loaded = loaded
        self._memory = memory
        self._tools = {captured: self._tools_for(captured) for captured in (True, False)}

    def bind(
        self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
    ) -> Launch:
        """Fix the memory of every input and output; a repeated launch becomes a CUDA graph.

        Raises:
            ContractError: The engine does not take these tensors; lists every problem.
        """
        launch = CapturedLaunch if repeated else PlainLaunch
        return launch(self._tools[repeated], dict(inputs), dict(outputs))

    def close(self) -> None:
        """Destroy the contexts, then the engine."""
        for tools in self._tools.values():
            tools.contexts.close()
        self.loaded.close()

    def _tools_for(self, captured: bool) -> LaunchTools:
        loaded, memory = self.loaded, self._memory

        def plan(inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice]) -> LaunchPlan:
            return plan_launch(loaded.tensors, inputs, outputs, memory, label=loaded.label)

        contexts = StreamContexts(
            lambda: loaded.create_context(captured=captured), memory.device, memory.resources, label=loaded.label
        )
        return LaunchTools(
            memory=memory,
            plan=plan,
            contexts=contexts,
            capturable=loaded.capturable,
            log=loaded.log,
            label=loaded.label,
        )


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
        loaded = {graph: LoadedEngine(machine, file, profile) for graph, file in files.items()}
        self._memory = DeviceMemory(machine.device, self._resources)
        self._programs = {graph: TensorRTProgram(engine, self._memory) for graph, engine in loaded.items()}
        prefill, step = loaded["prefill"].facts.most, loaded["step"].facts.most
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
