"""The builder of TensorRT or TensorRT-RTX, driven in a process of its own (``python -m`` this module).

The builder is native code that may crash (TensorRT-RTX 1.7 does on some valid graphs) and prints to the standard
streams as it likes; :mod:`crt_export.engine.tensorrt.build` starts this module, so that neither reaches the user. A job
comes as JSON on stdin; the answer goes to the original stdout: the length of a JSON header, the header, the plan.

``api`` is the module tensorrt or tensorrt_rtx. What only one of them has is used in functions named ``*_tensorrt`` and
``*_rtx``. Every runtime object is annotated with its class, and a test looks up each attribute and argument used here
in the genuine bindings of all supported versions.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_export.child_process import answer_stream
from crt_export.engine.tensorrt.api import (
    Api,
    Builder,
    EngineInspector,
    IBuilderConfig,
    ICudaEngine,
    IHostMemory,
    ILayer,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    Log,
    OnnxParser,
    ParserError,
    Runtime,
    dtype_name,
    load_api,
    logger_from_log,
    need_of_profile,
)
from crt_export.errors import BuildError, CrtExportError, MissingDependencyError, NoEngineError, problem_list
from crt_export.profile import EngineProfile
from crt_export.profile_options import TensorRTOptions
from crt_export.spec import GraphSpec, TensorSpec, interface_problems, same_sizes

#: Builder warnings that do not fail the build, as patterns, and why.
ALLOWED_WARNINGS = {
    r"Make sure (?:input|output) \S+ has Int64 binding\.": (
        "token ids and positions are int64 by contract, and the runtimes bind int64 buffers"
    ),
}


def unexpected_warnings(log: Log) -> list[str]:
    """The warnings that no entry of the allowlist covers."""
    patterns = [re.compile(rf"(?:\[[^\]]*\] |\S+\.cpp:\d+: )*{entry}") for entry in ALLOWED_WARNINGS]
    return [warning for warning in log.warnings if not any(p.fullmatch(warning.strip()) for p in patterns)]


#: Before the answer's JSON header: its length as an unsigned 64-bit little-endian integer.
HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One graph to compile.

    Attributes:
        path: The ONNX file, weights beside it.
        label: What to call the engine in messages.
        profile: The target.
        contract: The file's inputs and outputs as the parser must find them, and the caches updated in place.
        shapes: Per input its min, opt and max shape.
    """

    path: Path
    label: str
    profile: EngineProfile
    contract: GraphSpec
    shapes: dict[str, list[list[int]]]

    def to_json(self) -> str:
        """Return the job as :meth:`from_json` reads it."""
        values = {"path": str(self.path), "label": self.label, "shapes": self.shapes}
        contract = {"name": self.contract.name, **self.contract.to_dict()}
        return json.dumps({**values, "profile": self.profile.to_dict(), "contract": contract})

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        """Read a job."""
        values = json.loads(text)
        return cls(
            path=Path(values["path"]),
            label=values["label"],
            profile=EngineProfile.from_dict(values["profile"]),
            contract=GraphSpec.from_dict(values["contract"]["name"], values["contract"]),
            shapes=values["shapes"],
        )


@dataclass(frozen=True, kw_only=True)
class BuildAnswer:
    """What the builder made: the plan, the text of its layer list, allowed warnings, the runtime's version."""

    plan: memoryview
    layer_text: str
    warnings: list[str]
    version: str


def compile_graph(job: BuildJob) -> BuildAnswer:
    """Compile one graph in this process.

    Raises:
        MissingDependencyError: The runtime or its GPU is missing.
        UnsupportedError: The runtime has no such architecture.
        BuildError: The parser or the builder failed or warned, or made something else of the graph.
    """
    api = load_api(job.profile)
    log = Log()
    logger: ILogger = logger_from_log(api, log)
    builder: Builder = _builder(api, job, logger, log)
    flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: INetworkDefinition = builder.create_network(flags)
    parser: OnnxParser = _parse(api, job, network, logger, log)
    _check_network(api, job, network)
    config: IBuilderConfig = builder.create_builder_config()
    _configure(api, config, job.profile)
    _add_shapes(builder, config, job)
    plan: IHostMemory | None = builder.build_serialized_network(network, config)
    del parser  # it maps the weights that the network reads: not to be freed before the build
    problems = [*log.errors, *(f"warning: {warning}" for warning in unexpected_warnings(log))]
    if plan is None:
        raise NoEngineError(problem_list(f"building {job.label}", problems or ["no engine and no reason given"]))
    if problems:
        raise BuildError(problem_list(f"building {job.label}", problems))
    data = memoryview(plan)
    # TensorRT-RTX logs the layers while it builds; TensorRT must load the engine, which needs its GPU, to list them.
    rtx = job.profile.runtime == "tensorrt-rtx"
    layer_text = log.layer_text if rtx else _layer_text_tensorrt(api, job, data, logger, log)
    return BuildAnswer(plan=data, layer_text=layer_text, warnings=[*log.warnings], version=api.__version__)


def _builder(api: Api, job: BuildJob, logger: ILogger, log: Log) -> Builder:
    try:
        return api.Builder(logger)
    except TypeError as error:  # what pybind11 makes of the null pointer that stands for "no CUDA"
        reason = "; ".join(log.errors) or str(error)
        need = need_of_profile(job.profile)
        raise MissingDependencyError(f"{need}; its builder does not start: {reason}") from error


def _parse(api: Api, job: BuildJob, network: INetworkDefinition, logger: ILogger, log: Log) -> OnnxParser:
    parser: OnnxParser = api.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.path)):
        problems = list(log.errors)
        for index in range(parser.num_errors):
            error: ParserError = parser.get_error(index)
            problems.append(f"node {error.node_name()} ({error.node_operator()}): {error.desc()}")
        raise BuildError(problem_list(f"parsing {job.path} for {job.label}", problems or ["no reason given"]))
    return parser


def _check_network(api: Api, job: BuildJob, network: INetworkDefinition) -> None:
    """Hold the parsed network against the contract: same inputs and outputs, every cache updated in place."""
    found = GraphSpec(
        name=job.contract.name,
        inputs=tuple(_spec(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_spec(network.get_output(index)) for index in range(network.num_outputs)),
        aliases=(),
    )
    problems = [*interface_problems(job.contract, found, same_sizes)]
    updates = 0
    for index in range(network.num_layers):
        layer: ILayer = network.get_layer(index)
        updates += layer.type == api.LayerType.KV_CACHE_UPDATE
    if updates != len(job.contract.aliases):
        problems.append(f"{updates} in-place cache updates, {len(job.contract.aliases)} expected")
    if problems:
        raise BuildError(problem_list(f"{job.label}: what the parser made of {job.path.name}", problems))


def _spec(tensor: ITensor) -> TensorSpec:
    return TensorSpec(name=tensor.name, dtype=dtype_name(tensor.dtype), dims=tuple(tensor.shape))


def _configure(api: Api, config: IBuilderConfig, profile: EngineProfile) -> None:
    """Apply the profile's options and what sets the two runtimes apart."""
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    options = profile.options if isinstance(profile.options, TensorRTOptions) else TensorRTOptions()
    config.builder_optimization_level = options.optimization_level
    if options.workspace_mib:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if profile.runtime == "tensorrt-rtx":
        _configure_rtx(api, config, profile)
    else:
        _configure_tensorrt(api, config, options)


def _configure_rtx(api: Api, config: IBuilderConfig, profile: EngineProfile) -> None:
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(api.ComputeCapability, f"SM{profile.compute_capability}"), 0)


def _configure_tensorrt(api: Api, config: IBuilderConfig, options: TensorRTOptions) -> None:
    if options.ampere_plus:
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)


def _add_shapes(builder: Builder, config: IBuilderConfig, job: BuildJob) -> None:
    optimization: IOptimizationProfile = builder.create_optimization_profile()
    for name, (least, best, most) in job.shapes.items():
        optimization.set_shape(name, least, best, most)
    config.add_optimization_profile(optimization)


def _layer_text_tensorrt(api: Api, job: BuildJob, plan: memoryview, logger: ILogger, log: Log) -> str:
    """Load the engine on its GPU, check what can only be asked there, and return its layer list."""
    runtime: Runtime = api.Runtime(logger)
    engine: ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(problem_list(f"loading {job.label}", [*log.errors] or ["no reason given"]))
    problems = []
    wanted = api.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.profile.ampere_plus and engine.hardware_compatibility_level != wanted:
        problems.append(f"{wanted} was asked for and silently not applied")
    for present, past in job.contract.aliases:
        alias = engine.get_aliased_input_tensor(present)
        if alias != past:
            problems.append(f"{present} must share memory with {past}, the engine says {alias or 'with nothing'}")
    if problems:
        raise BuildError(problem_list(f"engine {job.label}", problems))
    inspector: EngineInspector = engine.create_engine_inspector()
    return inspector.get_engine_information(api.LayerInformationFormat.ONELINE)


def main() -> None:
    """Answer the job on stdin; deliberate errors are part of the answer."""
    stream = answer_stream()
    header: dict[str, Any]
    plan = memoryview(b"")
    try:
        answer = compile_graph(BuildJob.from_json(sys.stdin.read()))
        plan = answer.plan
        header = {"layer_text": answer.layer_text, "warnings": answer.warnings, "version": answer.version}
    except CrtExportError as error:
        header = {"error": type(error).__name__, "message": str(error)}
    text = json.dumps(header).encode()
    with stream:
        stream.write(HEADER_LENGTH.pack(len(text)) + text)
        stream.write(plan)


if __name__ == "__main__":
    main()
