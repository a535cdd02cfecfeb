"""Stage: what one target deploys: the graphs as they are, or forms of its own that TensorRT compiles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from crt_export.config import ModelConfig
from crt_export.errors import NoEngineError
from crt_export.graph import check_contract
from crt_export.graph.passes.decompose_attention import attention_form, decompose_attention
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.graph.passes.separate_rotation import separate_rotation
from crt_export.parity import ParityCase, case_from_profile
from crt_export.profile import EngineProfile
from crt_export.progress import Progress
from crt_export.quantize import expected_matmuls
from crt_export.spec import graph_spec
from crt_export.stages.graphs import GRAPHS_FOLDER, GraphFile, GraphForm, forms_of_profile
from crt_export.stages.keys import stage_key
from crt_export.stages.store import NO_STORE, StageStore

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

    def parity_case(self, folder: Path, config: ModelConfig) -> ParityCase:
        """What the parity stage checks, with absolute paths."""
        return case_from_profile(
            self.profile,
            {name: folder / file for name, file in self.graphs.items()},
            unroll=self.profile.unroll or 1,
            capacity=self.profile.capacity,
            cache_head_dim=config.head_dim,
            compiled=tuple(self.engines),
        )

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
            "head_dim": config.head_dim,
            "cache_head_dim": config.head_dim,
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


def build_target(
    profile: EngineProfile,
    written: Mapping[GraphForm, GraphFile],
    config: ModelConfig,
    folder: Path,
    progress: Progress,
    store: StageStore = NO_STORE,
) -> BuiltTarget:
    """Prepare one target in the staging folder.

    Args:
        profile: The target, resolved for this model.
        written: The graphs of its precision.
        config: The model.
        folder: Staging folder of the bundle.
        progress: Told what is compiled.
        store: Where engines compiled of the same graphs may lie. TensorRT's never do: they are timed on this GPU.

    Raises:
        MissingDependencyError: The target's compiler or the GPU it needs is absent.
        UnsupportedError: The profile insists on what its runtime cannot do.
        BuildError: The compiler failed or its result is not what the precision promises.
    """
    shared = {name: written[form] for name, form in forms_of_profile(profile, config).items()}
    form = attention_form(profile, config)
    if not profile.compiled:
        graphs = {name: file.file for name, file in shared.items()}
        return BuiltTarget(profile=profile, graphs=graphs, engines={}, attention=form, refused="", files=(), layers={})
    if store.folder is None or profile.runtime != "tensorrt-rtx":
        return _compile_target(profile, shared, form, config, folder, progress)
    files = sorted({name for file in shared.values() for name in (file.file, file.weights)})
    sources = {name: store.digest(folder / name) for name in files}
    key = stage_key(_STAGE, {"profile": profile.to_dict(), "config": config.to_dict(), "sources": sources})
    answer = store.restore(_STAGE, key, folder)
    if answer is not None:
        progress(f"compile {profile.name}: as stored by an earlier build", 0, 0)
        return BuiltTarget.from_stored(profile, answer)
    built = _compile_target(profile, shared, form, config, folder, progress)
    store.keep(_STAGE, key, folder, built.own_files(folder), built.to_stored())
    return built


def _compile_target(
    profile: EngineProfile,
    shared: Mapping[str, GraphFile],
    form: str,
    config: ModelConfig,
    folder: Path,
    progress: Progress,
) -> BuiltTarget:
    try:
        return _build_compiled(profile, shared, form, config, folder, progress)
    except NoEngineError as error:
        # Which shapes have a fused kernel is known to the compiler alone: "auto" means to try, then to do without.
        # Any other BuildError (a warning, a layer of the wrong precision) is final.
        if form == "decomposed" or profile.attention != "auto":
            raise
        refused = str(error)
    built = _build_compiled(profile, shared, "decomposed", config, folder, progress)
    return replace(built, refused=refused)


def _build_compiled(
    profile: EngineProfile,
    shared: Mapping[str, GraphFile],
    attention: str,
    config: ModelConfig,
    folder: Path,
    progress: Progress,
) -> BuiltTarget:
    own = [
        _write_target_form(profile, file, attention, config, folder) for name, file in shared.items() if name != "head"
    ]
    engines: dict[str, str] = {}
    layers: dict[str, Mapping[str, int]] = {}
    for done, file in enumerate(file for file in own if file.form.graph in COMPILED_GRAPHS):
        progress(f"compile {profile.name}, {attention} attention", done, len(COMPILED_GRAPHS))
        name = file.form.graph
        engines[name], layers[name] = _compile(profile, file, config, folder)
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
    profile: EngineProfile, file: GraphFile, config: ModelConfig, folder: Path
) -> tuple[str, Mapping[str, int]]:
    from crt_export.engine.tensorrt import build_engine

    name, unroll = file.form.graph, file.form.unroll
    linears = expected_matmuls(config, name, unroll)
    compiled = build_engine(folder / file.file, profile, graph_name=name, unroll=unroll, linears=linears)
    stem = f"{ENGINES_FOLDER}/{profile.name}/{name}"
    (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.engine").write_bytes(compiled.plan)
    _write_json(folder / f"{stem}.json", {**compiled.sidecar, "warnings": list(compiled.warnings)})
    _write_json(folder / f"{stem}.layers.json", [layer.to_dict() for layer in compiled.layers])
    return f"{stem}.engine", compiled.sidecar["layers"]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
