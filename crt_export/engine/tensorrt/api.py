"""TensorRT or TensorRT-RTX, imported or said to be missing, and every call of it that running an engine takes.

The rest of the session knows names and numbers only. The classes are Any for the type checker, because they come from
whichever of the two modules is installed. Code annotates each runtime object with one of these names, so that a test
can look up every attribute and argument used, here and in the builder, in the genuine bindings of every supported
version. Functions named ``*_rtx`` are for TensorRT-RTX only.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crt_export.environment import compile_need, compile_obstacle, find_dependency
from crt_export.errors import MissingDependencyError, UnsupportedError
from crt_export.machine import list_gpus
from crt_export.profile import EngineProfile
from crt_export.spec import TensorSpec

#: The module itself, tensorrt or tensorrt_rtx.
Api = Any
Builder = Any
EngineInspector = Any
IBuilderConfig = Any
ICudaEngine = Any
IExecutionContext = Any
IHostMemory = Any
ILayer = Any
ILogger = Any
INetworkDefinition = Any
IOptimizationProfile = Any
IRuntimeCache = Any
IRuntimeConfig = Any
ITensor = Any
OnnxParser = Any
ParserError = Any
Runtime = Any

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


def load_api(profile: EngineProfile) -> Api:
    """Import the runtime that a profile compiles with, after checking that it can compile here.

    Raises:
        MissingDependencyError: The package, its version or the GPU is missing; says what is needed.
        UnsupportedError: The runtime has no such architecture.
    """
    name = find_dependency(profile.runtime).module
    try:
        api: Api = importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"{need_of_profile(profile)}; {name} cannot be imported ({error})") from error
    obstacle = compile_obstacle(profile, api.__version__, list_gpus())
    if obstacle:
        raise MissingDependencyError(f"target {profile.name} needs {obstacle}")
    if profile.runtime == "tensorrt-rtx":
        _require_architecture_rtx(api, profile)
    return api


def _require_architecture_rtx(api: Api, profile: EngineProfile) -> None:
    known = [name for name in api.ComputeCapability.__members__ if name.startswith("SM")]
    if f"SM{profile.compute_capability}" not in known:
        raise UnsupportedError(
            f"target {profile.name}: TensorRT-RTX {api.__version__} compiles for {', '.join(known)}, "
            f"not SM{profile.compute_capability}"
        )


def need_of_profile(profile: EngineProfile) -> str:
    """Say what compiling a TensorRT or TensorRT-RTX profile needs."""
    return f"target {profile.name} needs {compile_need(profile)}"


class Log:
    """What TensorRT logged, in order; of a session, which may run for months, the newest only.

    Attributes:
        errors: Errors.
        warnings: Warnings.
        layer_text: The detailed layer list of a build.
    """

    def __init__(self, most: int | None = None) -> None:
        """Nothing yet; ``most`` limits how many errors and warnings are kept."""
        self.errors: deque[str] = deque(maxlen=most)
        self.warnings: deque[str] = deque(maxlen=most)
        self.layer_text = ""

    def take_errors(self) -> str:
        """The errors as one text, or that there were none; forgets them."""
        text = "; ".join(self.errors) or "no reason given"
        self.errors.clear()
        return text


def logger_from_log(api: Api, log: Log) -> ILogger:
    """Make a ``trt.ILogger`` that writes into ``log`` and prints nothing; it must outlive what it is given to.

    Native code calls it, possibly from its own threads, and cannot take an exception from it.
    """
    errors = (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR)

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)  # pybind11 refuses super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                log.errors.append(message)
            elif severity == api.ILogger.Severity.WARNING:
                log.warnings.append(message)
            elif severity == api.ILogger.Severity.VERBOSE and message.startswith("Layers:"):
                log.layer_text = message

    return Logger()


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a ``trt.DataType``; its own where NumPy or the contract has none."""
    name = str(dtype).rpartition(".")[2]
    return _DTYPES.get(name, name)


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """One input or output of a loaded engine.

    Attributes:
        spec: Name, dtype and dims; -1 for a dynamic dim.
        is_input: Whether it is read.
        least: Smallest shape of the profile; empty for outputs.
        most: Largest shape of the profile; empty for outputs.
        alias: The input whose memory an output shares; empty for none.
    """

    spec: TensorSpec
    is_input: bool
    least: tuple[int, ...]
    most: tuple[int, ...]
    alias: str


def create_runtime(api: Api, logger: ILogger, *, version_compatible: bool) -> Runtime:
    """A runtime; a version-compatible engine brings code of its own, which must be allowed."""
    runtime: Runtime = api.Runtime(logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime


def deserialize_engine(runtime: Runtime, plan: bytes) -> ICudaEngine | None:
    """Load a plan; None if TensorRT refuses it, the reason is in the log."""
    return runtime.deserialize_cuda_engine(plan)


def plan_validity_rtx(runtime: Runtime, plan: bytes) -> str:
    """What TensorRT-RTX says about a plan: its verdict, and the bits of EngineInvalidityDiagnostics."""
    verdict, diagnostics = runtime.get_engine_validity(plan)
    return f"{verdict}, diagnostics {int(diagnostics):#x}"


def tensors_of_engine(api: Api, engine: ICudaEngine) -> tuple[EngineTensor, ...]:
    """The engine's inputs and outputs, as its first optimization profile has them."""
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
        least, most = (), ()
        if is_input:
            smallest, _, largest = engine.get_tensor_profile_shape(name, 0)
            least, most = tuple(smallest), tuple(largest)
        dims = tuple(engine.get_tensor_shape(name))
        alias = "" if is_input else engine.get_aliased_input_tensor(name) or ""
        spec = TensorSpec(name=name, dtype=dtype_name(engine.get_tensor_dtype(name)), dims=dims)
        found.append(EngineTensor(spec=spec, is_input=is_input, least=least, most=most, alias=alias))
    return tuple(found)


def create_context(engine: ICudaEngine) -> IExecutionContext | None:
    """An execution context of TensorRT; None if there is no memory for it."""
    return engine.create_execution_context()


def context_config_rtx(api: Api, engine: ICudaEngine, cache: IRuntimeCache, *, captured: bool) -> IRuntimeConfig:
    """How contexts of TensorRT-RTX, which compiles kernels when it runs, do so; must outlive the contexts.

    A context whose launches are captured compiles the kernels of a shape before it goes on: left to itself
    TensorRT-RTX would run general ones first, and the graph would hold on to those. Graphs are captured by the
    session, never by TensorRT-RTX.
    """
    config: IRuntimeConfig = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = (
        api.DynamicShapesKernelSpecializationStrategy.EAGER
        if captured
        else api.DynamicShapesKernelSpecializationStrategy.LAZY
    )
    config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED
    config.set_runtime_cache(cache)
    return config


def create_context_rtx(engine: ICudaEngine, config: IRuntimeConfig) -> IExecutionContext | None:
    """An execution context of TensorRT-RTX; None if there is no memory for it."""
    return engine.create_execution_context(config)


def runtime_cache_rtx(engine: ICudaEngine, content: bytes | None) -> IRuntimeCache:
    """A cache of compiled kernels, filled from an earlier run where that fits this machine."""
    config: IRuntimeConfig = engine.create_runtime_config()
    cache: IRuntimeCache = config.create_runtime_cache()
    if content is not None:
        cache.deserialize(content)  # False, and an empty cache, for another version, driver or GPU
    return cache


def content_of_runtime_cache_rtx(cache: IRuntimeCache) -> bytes:
    """The cache as bytes; empty if it cannot be had."""
    memory: IHostMemory | None = cache.serialize()
    return b"" if memory is None else bytes(memoryview(memory))


def set_tensors(
    context: IExecutionContext, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
) -> list[str]:
    """Set every input's shape and every tensor's address; what the context refused."""
    refused = [
        f"shape {list(shape)} of {name}" for name, shape in shapes.items() if not context.set_input_shape(name, shape)
    ]
    return refused + [
        f"address {address:#x} of {name}"
        for name, address in addresses.items()
        if not context.set_tensor_address(name, address)
    ]


def enqueue(context: IExecutionContext, stream: int) -> bool:
    """Enqueue one run; False if it was refused, the reason is in the log."""
    return context.execute_async_v3(stream)


def stream_capturable_rtx(context: IExecutionContext, stream: int) -> bool:
    """Whether a run of this context can be captured into a graph."""
    return context.is_stream_capturable(stream)
