"""Loaded engines: the sidecar checked, the plan deserialised, what came out checked against the sidecar."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crt_export.engine.tensorrt import calls, runtime_cache
from crt_export.engine.tensorrt.api import Api, ICudaEngine, IExecutionContext, Log, Runtime, logger_from_log
from crt_export.engine.tensorrt.calls import EngineTensor
from crt_export.engine.tensorrt.device import Device
from crt_export.engine.tensorrt.launch import StreamContext
from crt_export.engine.tensorrt.sidecar import EngineFacts, EngineFile, read_sidecar
from crt_export.errors import ContractError, problem_list
from crt_export.machine import Gpu
from crt_export.profile import EngineProfile
from crt_export.spec import GraphSpec, interface_problems, same_sizes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where engines run.

    Attributes:
        api: The module ``tensorrt`` or ``tensorrt_rtx``.
        device: The GPU's memory and streams.
        gpu: Its name and architecture.
    """

    api: Api
    device: Device
    gpu: Gpu


class LoadedEngine:
    """One deserialised engine, with the runtime it needs to live.

    Attributes:
        facts: What its sidecar says.
        tensors: Its inputs and outputs, as the engine itself says.
        log: What TensorRT complained about.
        label: What to call it in messages.
    """

    def __init__(self, machine: Machine, file: EngineFile, profile: EngineProfile) -> None:
        """Check and load; see :func:`load_engine`."""
        self.label = f"{profile.name} {file.graph}"
        self.facts = read_sidecar(file, profile, machine.gpu, machine.api.__version__)
        self.log = Log(most=10)
        self._api = machine.api
        self._rtx = profile.runtime == "tensorrt-rtx"
        plan = file.read_plan()
        # TensorRT wants its objects destroyed in the reverse order: contexts, engine, runtime, logger.
        self._logger = logger_from_log(machine.api, self.log)
        self._runtime: Runtime = calls.create_runtime(
            machine.api, self._logger, version_compatible=profile.version_compatible
        )
        self._engine: ICudaEngine = self._deserialized(plan, file)
        self.tensors = calls.tensors_of_engine(machine.api, self._engine)
        problems = [*engine_problems(self.tensors, self.facts)]
        if problems:
            raise ContractError(problem_list(f"{file.path}: the engine is not what its sidecar says", problems))
        self._configs: dict[bool, Any] = {}
        self._cache: Any = None
        if self._rtx:
            self._open_cache(f"{machine.api.__version__}/{hashlib.sha256(plan).hexdigest()[:32]}")

    def create_context(self, *, captured: bool) -> IExecutionContext | None:
        """A new execution context; ``captured`` says whether its launches become CUDA graphs."""
        if not self._rtx:
            return calls.create_context(self._engine)
        if captured not in self._configs:
            self._configs[captured] = calls.context_config_rtx(self._api, self._engine, self._cache, captured=captured)
        return calls.create_context_rtx(self._engine, self._configs[captured])

    def capturable(self, context: StreamContext) -> bool:
        """Whether TensorRT lets a run in this context be captured; only TensorRT-RTX can be asked."""
        return not self._rtx or calls.stream_capturable_rtx(context.execution, context.stream)

    def close(self) -> None:
        """Keep the compiled kernels for the next process, then destroy the engine before its runtime."""
        if self._cache is not None:
            self._save()
        self._cache = None
        self._configs.clear()
        self._engine = None
        self._runtime = None

    def _deserialized(self, plan: bytes, file: EngineFile) -> ICudaEngine:
        engine = calls.deserialize_engine(self._runtime, plan)
        if engine is None:
            reason, name = self.log.take_errors(), "TensorRT"
            if self._rtx:
                reason, name = f"{reason}; {calls.plan_validity_rtx(self._runtime, plan)}", "TensorRT-RTX"
            raise ContractError(
                f"{file.path}: {name} {self._api.__version__} cannot load this engine of {len(plan):,} bytes "
                f"({reason}); build the bundle again on this machine"
            )
        return engine

    def _open_cache(self, name: str) -> None:
        path = runtime_cache.cache_path(name)
        self._cache = calls.runtime_cache_rtx(self._engine, runtime_cache.read_cache(path))
        self.log.take_errors()  # what a cache that does not fit made it say

        def save(cache: Any) -> None:
            runtime_cache.write_cache(path, calls.content_of_runtime_cache_rtx(cache))

        # Also where the application ends without closing: what was compiled once should not be compiled again.
        self._save = weakref.finalize(self, save, self._cache)


def engine_problems(tensors: tuple[EngineTensor, ...], facts: EngineFacts) -> Iterator[str]:
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
