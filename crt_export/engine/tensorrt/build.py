"""Compilation of an ONNX graph with TensorRT (10.16 or newer, 11.x) or TensorRT-RTX, and the checks of what came out.

TensorRT-RTX compiles without a GPU; TensorRT times kernels on the GPU it builds for.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from crt_export import errors
from crt_export.child_process import UNGROUPED, ChildGroup, ChildModule
from crt_export.engine.tensorrt.builder import HEADER_LENGTH, BuildAnswer, BuildJob
from crt_export.engine.tensorrt.layers import Layer, check_layers, layers_from_text, summarize_layers
from crt_export.errors import BuildError, NoEngineError, problem_list
from crt_export.graph.contract import interface_of
from crt_export.profile import EngineProfile
from crt_export.spec import GraphSpec, TensorSpec

_BUILDER = "crt_export.engine.tensorrt.builder"
_DELIBERATE = {
    cls.__name__: cls
    for cls in (errors.MissingDependencyError, errors.UnsupportedError, errors.BuildError, errors.NoEngineError)
}


@dataclass(frozen=True, kw_only=True)
class CompiledEngine:
    """An engine that passed every check.

    Attributes:
        plan: The serialised engine.
        layers: Its fused layers, for the bundle (``Layer.to_dict``).
        warnings: The builder's warnings, each of them on the allowlist.
        sidecar: JSON-ready facts that a runtime checks before it loads the plan.
    """

    plan: memoryview
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    sidecar: dict[str, Any]


def build_engine(
    graph_path: Path,
    profile: EngineProfile,
    *,
    graph_name: str,
    unroll: int,
    linears: int,
    children: ChildGroup = UNGROUPED,
) -> CompiledEngine:
    """Compile one graph for one profile and check the result.

    Args:
        graph_path: ONNX file in the TensorRT dialect, capacity fixed, weights beside it.
        profile: A profile whose runtime is ``tensorrt`` or ``tensorrt-rtx``.
        graph_name: ``step``, ``prefill``, ``prefill_pass`` or ``head``, for messages and the sidecar.
        unroll: Passes in the graph.
        linears: How many MatMuls by a weight the graph must hold: the model's linears times the passes.
        children: What the compiler's process belongs to, for whoever wants to end it.

    Raises:
        CancelledError: ``children`` was ended before.
        MissingDependencyError: The runtime, its version or the GPU that it needs is absent.
        UnsupportedError: The runtime cannot compile for the profile's architecture.
        BuildError: The graph is not what TensorRT compiles correctly, the builder failed, crashed or warned, or
            the fused layers are not what the precision promises.
    """
    source = source_graph_from_file(graph_path)
    if len(source.linears) != linears:
        raise BuildError(f"{graph_path}: {linears} MatMuls by a weight expected, {len(source.linears)} found")
    _check_capacity(source.contract, profile, graph_path)
    label = f"{profile.name} {graph_name}"
    shapes = {spec.name: _shapes_of(spec, profile, graph_path) for spec in source.contract.inputs}
    job = BuildJob(path=graph_path, label=label, profile=profile, contract=source.contract, shapes=shapes)
    answer = _answer_from_builder(job, children)
    layers = layers_from_text(answer.layer_text)
    check_layers(layers, precision=profile.precision, linears=source.linears, products=source.products, engine=label)
    sidecar = {
        "graph": graph_name,
        "unroll": unroll,
        "linears": linears,
        "runtime_version": answer.version,
        **_sidecar(job),
        "layers": summarize_layers(layers),
    }
    return CompiledEngine(plan=answer.plan, layers=layers, warnings=tuple(answer.warnings), sidecar=sidecar)


def _check_capacity(contract: GraphSpec, profile: EngineProfile, path: Path) -> None:
    caches = {past for _, past in contract.aliases}
    wrong = [str(spec) for spec in contract.inputs if spec.name in caches and spec.dims[-2] != profile.capacity]
    if wrong:
        raise BuildError(
            problem_list(f"{path}: caches for {profile.capacity} tokens expected (pass fix_capacity)", wrong)
        )


def _shapes_of(spec: TensorSpec, profile: EngineProfile, path: Path) -> list[list[int]]:
    """Return the min, opt and max shape of one input."""
    ranges = {"batch": profile.batch, "seq": profile.seq}
    unknown = [dim for dim in spec.dims if isinstance(dim, str) and dim not in ranges]
    if unknown:
        raise BuildError(f"{path}: input {spec}: {', '.join(unknown)} must be a number for TensorRT")
    sizes = [ranges[dim] if isinstance(dim, str) else (dim, dim, dim) for dim in spec.dims]
    return [[size[i] for size in sizes] for i in range(3)]


def _answer_from_builder(job: BuildJob, children: ChildGroup) -> BuildAnswer:
    """Run the builder in a process of its own and take its answer."""
    with ChildModule(_BUILDER, job.to_json(), children) as child:
        end = child.wait()
    if end.code != 0 or len(end.answer) < HEADER_LENGTH.size:
        what = f"building {job.label}: the {job.profile.runtime} builder died with {end.cause} on {job.path}"
        raise NoEngineError(f"{what}\n{end.last_words}")
    start = HEADER_LENGTH.size
    stop = start + HEADER_LENGTH.unpack_from(end.answer)[0]
    header = json.loads(end.answer[start:stop])
    if "error" in header:
        raise _DELIBERATE.get(header["error"], BuildError)(header["message"])
    return BuildAnswer(plan=memoryview(end.answer)[stop:], **header)


def _sidecar(job: BuildJob) -> dict[str, Any]:
    profile, contract = job.profile, job.contract.to_dict()
    inputs = []
    for entry in contract["inputs"]:
        least, best, most = job.shapes[entry["name"]]
        inputs.append({**entry, "min": least, "opt": best, "max": most})
    return {
        "target": profile.name,
        "runtime": profile.runtime,
        "compute_capability": profile.compute_capability,
        "precision": profile.precision,
        "capacity": profile.capacity,
        "options": profile.to_dict()["options"],
        "inputs": inputs,
        "outputs": contract["outputs"],
        "aliases": contract["aliases"],
    }


@dataclass(frozen=True, kw_only=True)
class SourceGraph:
    """The parts of an ONNX graph that its engine must show again.

    Attributes:
        contract: Its inputs and outputs, and the caches that TensorScatter updates in place.
        linears: Names of the MatMul nodes whose right-hand side is a weight, quantised or not.
        products: Names of the other nodes that multiply matrices: attention, fused or decomposed.
    """

    contract: GraphSpec
    linears: tuple[str, ...]
    products: tuple[str, ...]


def source_graph_from_file(path: Path) -> SourceGraph:
    """Read an ONNX file (not its weights).

    Raises:
        BuildError: The file cannot be read, or holds what TensorRT would compile to something else without a
            word; lists every such node.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # onnx_ir passes on whatever protobuf and its own reader raise
        raise BuildError(f"{path} cannot be read as ONNX: {error}") from error
    graph = model.graph
    problems = _dialect_problems(graph)
    if problems:
        raise BuildError(problem_list(f"{path} is outside the dialect that TensorRT compiles correctly", problems))
    matmuls = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
    linears = tuple(_name(node) for node in matmuls if _is_weight(node.inputs[1]))
    attention = [node for node in graph if node.op_type == "Attention"]
    scatters = [node for node in graph if node.op_type == "TensorScatter"]
    updates = tuple((_name(node.outputs[0]), _name(node.inputs[0])) for node in scatters)
    return SourceGraph(
        contract=dataclasses.replace(interface_of(model), aliases=updates),
        linears=linears,
        products=tuple(_name(node) for node in (*matmuls, *attention) if _name(node) not in linears),
    )


def _dialect_problems(graph: ir.Graph) -> list[str]:
    problems = []
    counts = Counter(node.name for node in graph if node.op_type in ("MatMul", "Gemm", "Attention"))
    problems += [
        f"matrix products need names of their own, {count} are called {name!r}"
        for name, count in counts.items()
        if count > 1 or not name
    ]
    for node in graph:
        if node.op_type == "Attention" and any(value is not None for value in node.inputs[4:]):
            problems.append(
                f"{node.name}: Attention takes query, key, value and mask only (the parser drops "
                "nonpad_kv_seqlen silently and refuses past_key)"
            )
        if node.op_type == "TensorScatter" and not (
            node.inputs[0] in graph.inputs and node.outputs[0] in graph.outputs
        ):
            problems.append(f"{node.name}: TensorScatter must go from a network input to a network output")
    return problems


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, directly or behind DequantizeLinear."""
    if value is None:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _is_weight(producer.inputs[0])
    return value.is_initializer()


def _name(item: ir.Node | ir.Value | None) -> str:
    return (item.name if item is not None else None) or ""
