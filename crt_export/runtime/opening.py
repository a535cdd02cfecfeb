"""An engine that runs, from a target of a bundle: checked files, loaded graphs, contract compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from crt_export.bundle import BundleFiles
from crt_export.checked import shown
from crt_export.engine.base import Engine, Program
from crt_export.environment import gpus, run_obstacles
from crt_export.errors import BundleError, ContractError, InputError, problem_list
from crt_export.models.declaration import Carried, ModelInfo
from crt_export.profile import EngineProfile
from crt_export.profile_options import OrtOptions
from crt_export.runtime.caches import TensorSizes
from crt_export.runtime.prefill import PrefillPlan, plan_from_entry
from crt_export.spec import GraphSpec, TensorSpec, compatible_sizes, graph_names, graph_spec, interface_problems

if TYPE_CHECKING:
    from crt_export.engine.tensorrt.engine import Machine

#: Without these there is no session; further engines of a compiled target are loaded too.
SESSION_GRAPHS = ("step", "prefill")
#: Loaded when a session first asks for them.
DEMANDED_GRAPHS = ("prefill_pass",)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target of a bundle, read from its manifest.

    Attributes:
        name: Its name.
        profile: The engine profile it was built for.
        graphs: Graph name to file of the bundle.
        capacity: Most tokens of a row: what it was built for, at most the model's max_position_embeddings.
        unroll: Passes of the unrolled prefill; None where the graph has one pass only.
        cache_dtype: ``float32`` or ``float16``.
        prefill: How prompts are taken unless a call says otherwise.
    """

    name: str
    profile: EngineProfile
    graphs: Mapping[str, str]
    capacity: int
    unroll: int | None
    cache_dtype: str
    prefill: PrefillPlan

    @property
    def rows_are_independent(self) -> bool:
        """Whether rows of one call get what each would get alone.

        ONNX Runtime's MatMulNBits with INT8 activations rounds a row's activations after sums whose order depends on
        the number of rows. Once in a while one rounds the other way, and a recurrent model carries that on: on the
        demo, logits of the same row differ by up to 0.5. So there each row runs alone.
        """
        return self.profile.precision != "w8"

    @property
    def runs_here(self) -> bool:
        """Whether a session can be opened: ONNX Runtime, or the packages and the GPU that a compiled target needs."""
        return not self.profile.compiled or not run_obstacles(self.profile, gpus())

    def one_graph(self, carried: Carried) -> str | None:
        """The graph that a session on a CPU loads for steps and prefill alike; None where each has its own."""
        graph = self.profile.one_graph(carried.iterated)
        return graph if graph in self.graphs else None

    def sizes(self, model: ModelInfo, batch: int, capacity: int) -> TensorSizes:
        """Sizes of the tensors of a session."""
        return TensorSizes(
            batch=batch,
            capacity=capacity,
            model=model,
            cache_dtype=self.cache_dtype,
            unroll=self.unroll if model.carried.iterated else None,
        )


def model_from_manifest(files: BundleFiles) -> ModelInfo:
    """The model, as the manifest declares it.

    Raises:
        BundleError: The manifest contradicts itself, or its contract is not one of its model.
    """
    try:
        model = ModelInfo.from_dict(files.manifest["model"])
    except ValueError as error:
        raise BundleError(f"{files.path}: the manifest's model is unusable: {error}") from error
    expected = {name: _tensors(graph_spec(name, model, "float32")) for name in graph_names(model.carried)}
    found = {name: _tensors(GraphSpec.from_dict(name, entry)) for name, entry in files.manifest["contract"].items()}
    named = {*found, *(name for target in files.manifest["targets"].values() for name in target["graphs"])}
    problems = [name for name in sorted(named) if name not in expected or found.get(name) != expected[name]]
    if problems:
        raise BundleError(
            f"{files.path}: the manifest's contract is unusable: of its model it is not for {', '.join(problems)}"
        )
    return model


def _tensors(graph: GraphSpec) -> str:
    """What two contracts are compared by: JSON, in which true is not 1, whatever the order of the tensors."""
    inputs, outputs = (sorted(map(TensorSpec.to_dict, side), key=str) for side in (graph.inputs, graph.outputs))
    return json.dumps([inputs, outputs, graph.aliases, sorted(graph.continues)])


def target_from_manifest(files: BundleFiles, name: str, model: ModelInfo) -> Target:
    """Read one target.

    Raises:
        InputError: The bundle has no such target.
        BundleError: Its profile is unusable.
    """
    entries: Mapping[str, Any] = files.manifest["targets"]
    if not isinstance(name, str) or name not in entries:
        known = ", ".join(entries) or "(none)"
        raise InputError(f"unknown target {shown(name)}: {files.path} was built for {known}")
    entry = entries[name]
    try:
        profile = EngineProfile.from_dict(entry["profile"], source=f"{name} of {files.path}")
    except InputError as error:
        raise BundleError(str(error)) from error
    return Target(
        name=name,
        profile=profile,
        graphs=dict(entry["graphs"]),
        capacity=min(entry["capacity"], model.max_position_embeddings),
        unroll=entry["unroll"],
        cache_dtype=entry["cache_dtype"],
        prefill=plan_from_entry(entry, iterated=model.carried.iterated),
    )


def engine_from_target(files: BundleFiles, target: Target, model: ModelInfo, threads: int) -> Engine:
    """Check the target's files, load its graphs and compare them with the contract.

    Args:
        files: The opened bundle.
        target: The target.
        model: The model.
        threads: CPU threads, 0 for every core.

    Raises:
        MissingDependencyError: The runtime or its device is absent.
        BundleError: A file is missing or differs from what was built.
        ContractError: A graph cannot be loaded or breaks the contract.
    """
    options = target.profile.options
    if not isinstance(options, OrtOptions):
        return compiled_engine(files, target, model)
    _refuse_missing(files, target, target.graphs, "graph")
    one_graph = target.one_graph(model.carried)
    loaded = SESSION_GRAPHS if one_graph is None else (one_graph,)
    graphs = {graph: files.held_graph(target.graphs[graph]) for graph in loaded}
    on_demand = {
        graph: partial(files.held_graph, target.graphs[graph])
        for graph in DEMANDED_GRAPHS
        if graph in target.graphs and graph not in loaded
    }
    from crt_export.engine.onnxruntime import OrtEngine
    from crt_export.engine.ort import OrtSettings

    settings = OrtSettings(device=target.profile.device, threads=threads, options=options)
    engine = OrtEngine(
        graphs,
        settings,
        max_tokens=target.profile.seq.max,
        one_graph=one_graph,
        on_demand=on_demand,
        check=lambda graph, program: check_contract({graph: program}, target, model),
    )
    check_contract({graph: engine.program(graph) for graph in loaded}, target, model)
    return engine


def check_contract(programs: Mapping[str, Program], target: Target, model: ModelInfo) -> None:
    """Compare loaded graphs with the contract of ``graphs/*.toml``.

    Raises:
        ContractError: Lists every tensor that is missing, unknown, or of another dtype or shape.
    """
    problems = [
        f"{graph}: {problem}"
        for graph, program in programs.items()
        for problem in interface_problems(graph_spec(graph, model, target.cache_dtype), program, compatible_sizes)
    ]
    if problems:
        raise ContractError(problem_list(f"the graphs of {target.name} break the contract", problems))


def compiled_engine(files: BundleFiles, target: Target, model: ModelInfo, machine: Machine | None = None) -> Engine:
    """Check this machine, then the target's files, then load its engines.

    Args:
        files: The opened bundle.
        target: The target.
        model: The model.
        machine: Where the engines run; None: on this machine.

    Raises:
        MissingDependencyError: This machine lacks a package or the GPU, or has another one than the engine needs.
        BundleError: A file is missing or differs from what was built.
        ContractError: An engine cannot be loaded or breaks the contract.
    """
    from crt_export.engine.tensorrt.engine import TensorRTEngine, machine_of_profile
    from crt_export.engine.tensorrt.sidecar import EngineFile

    place = machine_of_profile(target.profile) if machine is None else machine
    entries: Mapping[str, str] = files.manifest["targets"][target.name]["engines"]
    _refuse_missing(files, target, entries, "engine")
    engines = {
        graph: EngineFile(
            graph=graph,
            path=files.path / name,
            sidecar=files.path / (sidecar := str(PurePosixPath(name).with_suffix(".json"))),
            read_plan=partial(files.content, name),
            read_sidecar=partial(files.content, sidecar),
            contract=graph_spec(graph, model, target.cache_dtype, target.profile.capacity),
            unroll=(target.unroll or 1) if graph == "prefill" else 1,
        )
        for graph, name in entries.items()
    }
    return TensorRTEngine(place, engines, target.profile)


def _refuse_missing(files: BundleFiles, target: Target, there: Mapping[str, str], kind: str) -> None:
    missing = [graph for graph in SESSION_GRAPHS if graph not in there]
    if missing:
        raise BundleError(
            f"{files.path}: target {target.name} has no {' and no '.join(missing)} {kind}; build it again"
        )
