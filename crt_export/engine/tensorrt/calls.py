"""Every call of the TensorRT API that running an engine takes; the rest of the session knows names and numbers only.

As in the builder, each runtime object is annotated with its class and a test looks up every attribute and argument
used here in the genuine bindings. Functions named ``*_rtx`` are for TensorRT-RTX only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crt_export.engine.tensorrt.api import (
    Api,
    ICudaEngine,
    IExecutionContext,
    IHostMemory,
    ILogger,
    IRuntimeCache,
    IRuntimeConfig,
    Runtime,
)
from crt_export.spec import TensorSpec

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


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
        dtype = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        dims = tuple(engine.get_tensor_shape(name))
        alias = "" if is_input else engine.get_aliased_input_tensor(name) or ""
        spec = TensorSpec(name=name, dtype=_DTYPES.get(dtype, dtype), dims=dims)
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
    refused = [f"shape {list(shape)} of {name}" for name, shape in shapes.items() if not _set(context, name, shape)]
    return refused + [
        f"address {address:#x} of {name}"
        for name, address in addresses.items()
        if not context.set_tensor_address(name, address)
    ]


def _set(context: IExecutionContext, name: str, shape: tuple[int, ...]) -> bool:
    return context.set_input_shape(name, shape)


def enqueue(context: IExecutionContext, stream: int) -> bool:
    """Enqueue one run; False if it was refused, the reason is in the log."""
    return context.execute_async_v3(stream)


def stream_capturable_rtx(context: IExecutionContext, stream: int) -> bool:
    """Whether a run of this context can be captured into a graph."""
    return context.is_stream_capturable(stream)
