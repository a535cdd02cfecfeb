"""Stage: what one target deploys: the graphs as they are, or forms of its own that TensorRT compiles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from crt_export.build.graphs import GRAPHS_FOLDER, GraphFile, GraphForm, forms_of_profile
from crt_export.build.keys import stage_key
from crt_export.build.side_by_side import Task, compilers_at_once, run_side_by_side
from crt_export.build.store import NO_STORE, StageStore
from crt_export.child_process import UNGROUPED, ChildGroup
from crt_export.config import ModelConfig
from crt_export.errors import NoEngineError
from crt_export.graph import check_contract
from crt_export.graph.passes.decompose_attention import attention_form, decompose_attention
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.graph.passes.separate_rotation import separate_rotation
from crt_export.profile import EngineProfile
from crt_export.progress import Progress
from crt_export.quantize import expected_matmuls
from crt_export.spec import graph_spec

ENGINES_FOLDER = "engines"
_STAGE = "engines"
#: The graphs an engine is compiled of; prefill_pass and head serve validation and stay ONNX.
COMPILED_GRAPHS = ("step", "prefill")


@dataclass(frozen=True, kw_only=True)
class BuiltTarget:
    """One target as it stands in the bundle.

    Attributes:
        profile: Resolved for this model.
        graphs: ONNX file per graph name, relative to the bundle; what is validated.
        engines: Engine file per compiled graph.
        attention: ``fused`` or ``decomposed``.
        refused: What the compiler said to the fused form, where that is why attention is decomposed; else empty.
        files: Entries for the manifest of graph files made for this target only.
        layers: Fused layers per compiled graph, counted by signature.
    """

    profile: EngineProfile
    graphs: Mapping[str, str]
    engines: Mapping[str, str]
    attention: str
    refused: str
    files: tuple[GraphFile, ...]
    layers: Mapping[str, Mapping[str, int]]

    def to_dict(self, config: ModelConfig) -> dict[str, Any]:
        """The target's entry in the manifest."""
        return {
            "profile": self.profile.to_dict(),
            "graphs": dict(self.graphs),
            "engines": dict(self.engines),
            "capacity": self.profile.capacity,
            "unroll": self.profile.unroll,
            "attention": self.attention,
            "attention_refused": self.refused,
            "cache_dtype": self.profile.cache_dtype,
        }

    def own_files(self, folder: Path) -> list[str]:
        """Files in the bundle that were made for this target only."""
        own = folder / ENGINES_FOLDER / self.profile.name
        engines = [path.relative_to(folder).as_posix() for path in sorted(own.iterdir())]
        return [*(file.file for file in self.files), *engines]

    def to_stored(self) -> dict[str, Any]:
        """JSON-ready values, all but the profile; :meth:`from_stored` reads them back."""
        return {
            "graphs": dict(self.graphs),
            "engines": dict(self.engines),
            "attention": self.attention,
            "refused": self.refused,
            "files": [file.to_dict() for file in self.files],
            "layers": {name: dict(counts) for name, counts in self.layers.items()},
        }

    @classmethod
    def from_stored(cls, profile: EngineProfile, values: Mapping[str, Any]) -> BuiltTarget:
        """Read what to_stored wrote."""
        return cls(**{**values, "profile": profile, "files": tuple(map(GraphFile.from_dict, values["files"]))})


def build_targets(
    profiles: Sequence[EngineProfile],
    written: Mapping[GraphForm, GraphFile],
    config: ModelConfig,
    folder: Path,
    progress: Progress,
    store: StageStore = NO_STORE,
) -> tuple[BuiltTarget, ...]:
    """Prepare all targets in the staging folder, those that compile without a GPU side by side where memory allows.

    Args:
        profiles: The targets, resolved for this model.
        written: The graphs of their precisions.
        config: The model.
        folder: Staging folder of the bundle.
        progress: Told what is compiled.
        store: Where engines compiled of the same graphs may lie. TensorRT's never do: they are timed on this GPU.

    Raises:
        MissingDependencyError: A target's compiler or the GPU it needs is absent.
        UnsupportedError: A profile insists on what its runtime cannot do.
        BuildError: A compiler failed or its result is not what the precision promises.
    """
    stage = _TargetStage(written, config, folder, store)
    built: dict[str, BuiltTarget] = {}
    beside: dict[str, Task[BuiltTarget]] = {}
    for profile in profiles:
        found = stage.ready(profile, progress)
        if found is not None:
            built[profile.name] = found
        elif profile.runtime == "tensorrt-rtx":
            beside[profile.name] = partial(stage.compile, profile)
        else:  # its kernels are timed: nothing else may run
            built[profile.name] = stage.compile(profile, progress, UNGROUPED)
    known = {profile.name: profile for profile in profiles}

    def finished(name: str, target: BuiltTarget) -> None:
        stage.keep(known[name], target)
        built[name] = target

    if beside:
        workers = compilers_at_once([folder / file.weights for name in beside for file in stage.shared(known[name])])
        run_side_by_side(beside, workers, progress, finished)
    return tuple(built[profile.name] for profile in profiles)


class _TargetStage:
    """What all targets of a build have in common."""

    def __init__(
        self, written: Mapping[GraphForm, GraphFile], config: ModelConfig, folder: Path, store: StageStore
    ) -> None:
        self._written, self._config, self._folder, self._store = written, config, folder, store

    def shared(self, profile: EngineProfile) -> list[GraphFile]:
        """The graphs of its precision."""
        return [self._written[form] for form in forms_of_profile(profile, self._config).values()]

    def ready(self, profile: EngineProfile, progress: Progress) -> BuiltTarget | None:
        """A target that needs no compiler, or was compiled before; else None."""
        if not profile.compiled:
            graphs = {file.form.graph: file.file for file in self.shared(profile)}
            form = attention_form(profile, self._config)
            return BuiltTarget(
                profile=profile, graphs=graphs, engines={}, attention=form, refused="", files=(), layers={}
            )
        key = self._key(profile)
        if not key:
            return None
        stored = self._store.restore_as(
            _STAGE, key, self._folder, lambda answer: BuiltTarget.from_stored(profile, answer)
        )
        if stored is not None:
            progress(f"compile {profile.name}: as stored by an earlier build", 0, 0)
        return stored

    def compile(self, profile: EngineProfile, progress: Progress, children: ChildGroup) -> BuiltTarget:
        """Compile it, with attention in the form that its runtime has."""
        form = attention_form(profile, self._config)
        shared = {file.form.graph: file for file in self.shared(profile)}
        return _compile_target(profile, shared, form, self._config, self._folder, progress, children)

    def keep(self, profile: EngineProfile, built: BuiltTarget) -> None:
        """Store what was compiled, for later builds."""
        key = self._key(profile)
        if key:
            self._store.keep(_STAGE, key, self._folder, built.own_files(self._folder), built.to_stored())

    def _key(self, profile: EngineProfile) -> str:
        """Empty for what is not stored."""
        if self._store.folder is None or profile.runtime != "tensorrt-rtx":
            return ""
        files = sorted({name for file in self.shared(profile) for name in (file.file, file.weights)})
        sources = {name: self._store.digest(self._folder / name) for name in files}
        inputs = {"profile": profile.to_dict(), "config": self._config.to_dict(), "sources": sources}
        return stage_key(_STAGE, inputs)


def _compile_target(
    profile: EngineProfile,
    shared: Mapping[str, GraphFile],
    form: str,
    config: ModelConfig,
    folder: Path,
    progress: Progress,
    children: ChildGroup,
) -> BuiltTarget:
    try:
        return _build_compiled(profile, shared, form, config, folder, progress, children)
    except NoEngineError as error:
        # Which shapes have a fused kernel is known to the compiler alone: "auto" means to try, then to do without.
        # Any other BuildError (a warning, a layer of the wrong precision) is final.
        if form == "decomposed" or profile.attention != "auto":
            raise
        refused = str(error)
    built = _build_compiled(profile, shared, "decomposed", config, folder, progress, children)
    return replace(built, refused=refused)


def _build_compiled(
    profile: EngineProfile,
    shared: Mapping[str, GraphFile],
    attention: str,
    config: ModelConfig,
    folder: Path,
    progress: Progress,
    children: ChildGroup,
) -> BuiltTarget:
    own = [
        _write_target_form(profile, file, attention, config, folder) for name, file in shared.items() if name != "head"
    ]
    engines: dict[str, str] = {}
    layers: dict[str, Mapping[str, int]] = {}
    for done, file in enumerate(file for file in own if file.form.graph in COMPILED_GRAPHS):
        progress(f"compile {profile.name}, {attention} attention", done, len(COMPILED_GRAPHS))
        name = file.form.graph
        engines[name], layers[name] = _compile(profile, file, config, folder, children)
    progress(f"compile {profile.name}, {attention} attention", len(COMPILED_GRAPHS), len(COMPILED_GRAPHS))
    graphs = {name: file.file for name, file in shared.items()} | {file.form.graph: file.file for file in own}
    return BuiltTarget(
        profile=profile,
        graphs=graphs,
        engines=engines,
        attention=attention,
        refused="",
        files=tuple(own),
        layers=layers,
    )


def _write_target_form(
    profile: EngineProfile, file: GraphFile, attention: str, config: ModelConfig, folder: Path
) -> GraphFile:
    """Write the graph as this target compiles it; it shares the weight file of its precision."""
    graph = ir.load(folder / file.file)
    fix_capacity(graph, profile.capacity)
    separate_rotation(graph)
    if attention == "decomposed":
        decompose_attention(graph)
    check_contract(graph, graph_spec(file.form.graph, config, profile.cache_dtype, profile.capacity))
    name = f"{GRAPHS_FOLDER}/{file.form.graph}.{profile.name}.onnx"
    ir.save(graph, folder / name)
    return GraphFile(form=file.form, file=name, weights=file.weights, quantized_matmuls=file.quantized_matmuls)


def _compile(
    profile: EngineProfile, file: GraphFile, config: ModelConfig, folder: Path, children: ChildGroup
) -> tuple[str, Mapping[str, int]]:
    from crt_export.engine.tensorrt.build import build_engine

    name, unroll = file.form.graph, file.form.unroll
    linears = expected_matmuls(config, name, unroll)
    compiled = build_engine(
        folder / file.file, profile, graph_name=name, unroll=unroll, linears=linears, children=children
    )
    stem = f"{ENGINES_FOLDER}/{profile.name}/{name}"
    (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.engine").write_bytes(compiled.plan)
    _write_json(folder / f"{stem}.json", {**compiled.sidecar, "warnings": list(compiled.warnings)})
    _write_json(folder / f"{stem}.layers.json", [layer.to_dict() for layer in compiled.layers])
    return f"{stem}.engine", compiled.sidecar["layers"]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
