"""The TensorRT API as far as the session uses it, executing the ONNX graphs of a bundle through ONNX Runtime.

An "engine" made by :func:`recorded_engine` names the ONNX file, its shapes and the caches it updates in place. A run
reads and writes the memory of a :class:`RecordingDevice`. Before each run every output but the caches is filled
with NaN (integers with an impossible value), so that nothing stale passes for a result. What TensorRT would get
wrong in silence is refused: an output that shares memory, a cache that is not updated in place, an address that is
not aligned, a capture without a run before it, a graph launched after its context was given other tensors.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from recording_device import RecordingDevice

from crt_export.engine.onnxruntime import OrtGraph, load_graph
from crt_export.spec import GraphSpec

VERSION = "1.7.1.116"
_MAGIC = b"recorded engine\n"
_IMPOSSIBLE = -(1 << 62)


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class ExecutionStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    INFO = 3


class Logger:
    """Base class that the session's logger inherits."""

    Severity = Severity

    def log(self, severity: Any, message: str) -> None:
        raise AssertionError("the session's logger overrides this")


def recorded_engine(
    onnx: Path, contract: GraphSpec, ranges: Mapping[str, tuple[int, int]]
) -> tuple[bytes, dict[str, Any]]:
    """A plan for :class:`RecordingTensorRT`, and the entries of its sidecar that describe inputs and outputs.

    Args:
        onnx: The graph, where it will lie when the engine is loaded.
        contract: Its inputs and outputs, dims as names or numbers.
        ranges: Smallest and largest size of each named dim.
    """
    values = contract.to_dict()
    for entry in values["inputs"]:
        pairs = [ranges[dim] if isinstance(dim, str) else (dim, dim) for dim in entry["dims"]]
        entry["min"], entry["opt"], entry["max"] = ([pair[side] for pair in pairs] for side in (0, 1, 1))
    plan = _MAGIC + json.dumps({"onnx": str(onnx), "name": contract.name, **values}).encode()
    return plan + _MAGIC, values


class RecordingTensorRT:
    """Stands in for the module ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        device: Where runs read and write.
        runs: Graph names of the runs that were enqueued, in order; launches of captured graphs are not.
        contexts: How many execution contexts were made.
        fail: Names of calls that fail.
        spoil_first_run: Engines whose contexts leave NaN in the caches after their first run.
        mutate: Called with an engine's description before it is "deserialised".
    """

    __version__ = VERSION
    ILogger = Logger
    DataType = DataType
    TensorIOMode = TensorIOMode
    DynamicShapesKernelSpecializationStrategy = ExecutionStrategy
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, device: RecordingDevice) -> None:
        self.device = device
        self.runs: list[str] = []
        self.contexts: list[Context] = []
        self.fail: set[str] = set()
        self.spoil_first_run: set[str] = set()
        self.mutate: Any = None
        self.caches: list[Cache] = []

    def Runtime(self, logger: Logger) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    def __init__(self, api: RecordingTensorRT, logger: Logger) -> None:
        self.api = api
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        whole = plan.startswith(_MAGIC) and plan.endswith(_MAGIC) and len(plan) > 2 * len(_MAGIC)
        if not whole or "deserialize_cuda_engine" in self.api.fail:
            self.logger.log(Severity.ERROR, "Serialization assertion stdArchiveReader failed.")
            return None
        values = json.loads(plan[len(_MAGIC) : -len(_MAGIC)])
        if self.api.mutate is not None:
            self.api.mutate(values)
        return Engine(self, values)

    def get_engine_validity(self, plan: bytes) -> tuple[str, int]:
        return "EngineValidity.INVALID", 0x20


class Engine:
    def __init__(self, runtime: Runtime, values: dict[str, Any]) -> None:
        self.api = runtime.api
        self.logger = runtime.logger
        self.name = str(values["name"])
        self.graph = _graph(values["onnx"])
        self.inputs = {entry["name"]: entry for entry in values["inputs"]}
        self.tensors = {entry["name"]: entry for entry in (*values["inputs"], *values["outputs"])}
        self.aliases: dict[str, str] = dict(values["aliases"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return {"float32": DataType.FLOAT, "float16": DataType.HALF, "int64": DataType.INT64}[
            self.tensors[name]["dtype"]
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.tensors[name]["dims"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        least, most = (tuple(self.inputs[name][side]) for side in ("min", "max"))
        return [least, least, most]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> Config:
        return Config(self.api)

    def create_execution_context(self, config: Config | None = None) -> Context | None:
        if "create_execution_context" in self.api.fail:
            self.logger.log(Severity.ERROR, "Requested amount of GPU memory could not be allocated.")
            return None
        context = Context(self, config)
        self.api.contexts.append(context)
        return context


class Config:
    def __init__(self, api: RecordingTensorRT) -> None:
        self.api = api
        self.dynamic_shapes_kernel_specialization_strategy = ExecutionStrategy.LAZY
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        self.api.caches.append(Cache())
        return self.api.caches[-1]

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Cache:
    """Holds the content it was given, and a line per engine that ran with it."""

    def __init__(self) -> None:
        self.content = b""
        self.given: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.given = blob
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content


class Context:
    def __init__(self, engine: Engine, config: Config | None) -> None:
        self.engine = engine
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.changes = 0
        self.ready = False  # whether it has run since the last change, so that it can be captured
        self.graphs = 0
        self.has_run = False

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        entry = self.engine.inputs[name]
        if "set_input_shape" in self.engine.api.fail or not all(
            low <= size <= high for low, size, high in zip(entry["min"], shape, entry["max"], strict=True)
        ):
            self.engine.logger.log(Severity.ERROR, f"Set dimension {list(shape)} for tensor {name} does not satisfy")
            return False
        self._change(self.shapes, name, tuple(shape))
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if "set_tensor_address" in self.engine.api.fail:
            return False
        if address % 256:
            raise self._misuse(f"the address {address:#x} of {name} is no multiple of 256")
        self._change(self.addresses, name, address)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return "is_stream_capturable" not in self.engine.api.fail

    def execute_async_v3(self, stream: int) -> bool:
        api = self.engine.api
        if "execute_async_v3" in api.fail or ("captured execute_async_v3" in api.fail and api.device.capturing(stream)):
            self.engine.logger.log(Severity.ERROR, "Error Code 1: Cuda Runtime (invalid argument)")
            return False
        missing = [n for n in self.engine.tensors if n not in self.addresses]
        missing += [n for n in self.engine.inputs if n not in self.shapes]
        if missing:
            raise self._misuse(f"{', '.join(missing)} not set")
        self._check_memory()
        if api.device.capturing(stream):
            self._capture(stream)
        else:
            api.runs.append(self.engine.name)
            self._enqueue(stream)
        return True

    def _enqueue(self, stream: int) -> None:
        spoil = not self.has_run and self.engine.name in self.engine.api.spoil_first_run
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.ready = self.has_run = True
        self.engine.api.device.enqueue(stream, lambda: self._run(shapes, addresses, spoil=spoil))
        cache = self.config.cache if self.config else None
        if cache is not None and self.engine.name.encode() not in cache.content:
            cache.content += self.engine.name.encode()

    def _capture(self, stream: int) -> None:
        if not self.ready:
            raise self._misuse("captured without a run before it")
        if self.config is not None and (
            self.config.dynamic_shapes_kernel_specialization_strategy is ExecutionStrategy.LAZY
        ):
            raise self._misuse("captured while kernels of TensorRT-RTX may still be exchanged")
        if self.graphs:
            raise self._misuse("one context captured into two graphs")
        self.graphs += 1
        changes, shapes, addresses = self.changes, dict(self.shapes), dict(self.addresses)

        def run() -> None:
            if self.changes != changes:
                raise self._misuse("a graph is launched after its context was given other tensors")
            self._run(shapes, addresses, spoil=False)

        def freed() -> None:
            self.graphs -= 1

        self.engine.api.device.enqueue(stream, run, freed)

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], *, spoil: bool) -> None:
        engine, device = self.engine, self.engine.api.device

        def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(engine.tensors[name]["dtype"])
            return device.view(addresses[name], math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

        feeds = {name: np.array(array(name, shapes[name])) for name in engine.inputs}
        sizes = self._sizes(shapes)
        outputs = {name: array(name, sizes[name]) for name in engine.tensors if name not in engine.inputs}
        for name, output in outputs.items():
            if name not in engine.aliases:
                output[...] = _IMPOSSIBLE if output.dtype.kind == "i" else np.nan
        for name, result in engine.graph.run(feeds).items():
            outputs[name][...] = result
            if spoil and name in engine.aliases:
                outputs[name][...] = np.nan

    def _sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors: named dims are those of the inputs."""
        known: dict[str, int] = {}
        for name, shape in shapes.items():
            known.update({d: s for d, s in zip(self.engine.tensors[name]["dims"], shape, strict=True) if d != s})
        return {
            name: tuple(known[dim] if isinstance(dim, str) else dim for dim in entry["dims"])
            for name, entry in self.engine.tensors.items()
        }

    def _check_memory(self) -> None:
        engine = self.engine
        for present, past in engine.aliases.items():
            if self.addresses[present] != self.addresses[past]:
                raise self._misuse(f"{present} is not at the address of {past}")
        sizes, spans = self._sizes(self.shapes), {}
        for name, address in self.addresses.items():
            size = math.prod(sizes[name]) * np.dtype(engine.tensors[name]["dtype"]).itemsize
            spans[name] = (address, address + size)
        for name in engine.tensors.keys() - engine.inputs.keys() - engine.aliases.keys():
            for other, (begin, end) in spans.items():
                if other != name and spans[name][0] < end and begin < spans[name][1]:
                    raise self._misuse(f"{name} shares memory with {other}")

    def _change(self, values: dict[str, Any], name: str, value: Any) -> None:
        if values.get(name) != value:
            values[name] = value
            self.changes += 1
            self.ready = False

    def _misuse(self, text: str) -> AssertionError:
        return self.engine.api.device.misuse(f"{self.engine.name}: {text}")


@cache
def _graph(path: str) -> OrtGraph:
    return load_graph(path, threads=1)
