"""Stage: what one target deploys: its graphs, and the engines that TensorRT compiles of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crt_export.child_process import UNGROUPED, ChildGroup
from crt_export.config import ModelConfig
from crt_export.errors import NoEngineError
from crt_export.profile import EngineProfile
from crt_export.progress import Progress
from crt_export.quantize import expected_matmuls
from crt_export.stages.graphs import decomposed_file
from crt_export.stages.keys import stage_key
from crt_export.stages.side_by_side import Task, compilers_at_once, run_side_by_side
from crt_export.stages.store import NO_STORE, StageStore
from crt_export.stages.variants import GraphFile, GraphVariant, variants_of_profile

ENGINES_FOLDER = "engines"
_STAGE = "engines"
#: The graphs an engine is compiled of; prefill_pass and head serve validation and stay ONNX.
COMPILED_GRAPHS = ("step", "prefill")


@dataclass(frozen=True, kw_only=True)
class BuiltTarget:
    """One target as it stands in the bundle.

    Attributes:
        profile: Resolved for this model.
        graphs: Per graph name; what is validated.
        engines: Engine file per compiled graph.
        refused: What the compiler said to fused attention, where that is why it is decomposed; else empty.
        layers: Fused layers per compiled graph, counted by signature.
    """

    profile: EngineProfile
    graphs: Mapping[str, GraphFile]
    engines: Mapping[str, str]
    refused: str
    layers: Mapping[str, Mapping[str, int]]

    @property
    def attention(self) -> str:
        """``fused`` or ``decomposed``."""
        return self.graphs["step"].variant.attention

    def to_dict(self, config: ModelConfig) -> dict[str, Any]:
        """The target's entry in the manifest."""
        return {
            "profile": self.profile.to_dict(),
            "graphs": {name: file.file for name, file in self.graphs.items()},
            "engines": dict(self.engines),
            "capacity": self.profile.capacity,
            "unroll": self.profile.unroll,
            "attention": self.attention,
            "attention_refused": self.refused,
            "cache_dtype": self.profile.cache_dtype,
        }

    def to_stored(self) -> dict[str, Any]:
        """JSON-ready values of what was compiled; :meth:`_TargetStage.ready` reads them back."""
        return {
            "engines": dict(self.engines),
            "refused": self.refused,
            "layers": {name: dict(counts) for name, counts in self.layers.items()},
        }


def build_targets(
    profiles: Sequence[EngineProfile],
    written: Mapping[GraphVariant, GraphFile],
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
        workers = compilers_at_once({folder / stage.graphs(known[name])["step"].weights for name in beside})
        run_side_by_side(beside, workers, progress, finished)
    return tuple(built[profile.name] for profile in profiles)


class _TargetStage:
    """What all targets of a build have in common."""

    def __init__(
        self, written: Mapping[GraphVariant, GraphFile], config: ModelConfig, folder: Path, store: StageStore
    ) -> None:
        self._written, self._config, self._folder, self._store = written, config, folder, store

    def graphs(self, profile: EngineProfile) -> dict[str, GraphFile]:
        """Its graphs by name."""
        variants = variants_of_profile(profile, self._config)
        return {name: self._written[variant] for name, variant in variants.items()}

    def ready(self, profile: EngineProfile, progress: Progress) -> BuiltTarget | None:
        """A target that needs no compiler, or was compiled before; else None."""
        if not profile.compiled:
            return BuiltTarget(profile=profile, graphs=self.graphs(profile), engines={}, refused="", layers={})
        key = self._key(profile)
        stored = self._store.restore_as(_STAGE, key, self._folder, partial(self._restored, profile)) if key else None
        if stored is not None:
            progress(f"compile {profile.name}: as stored by an earlier build", 0, 0)
        return stored

    def compile(self, profile: EngineProfile, progress: Progress, children: ChildGroup) -> BuiltTarget:
        """Compile it, with attention in the form that its runtime has."""
        graphs, refused = self.graphs(profile), ""
        try:
            engines, layers = self._engines(profile, graphs, progress, children)
        except NoEngineError as error:
            # Which shapes have a fused kernel is known to the compiler alone: "auto" means to try, then to do without.
            # Any other BuildError (a warning, a layer of the wrong precision) is final.
            if graphs["step"].variant.attention == "decomposed" or profile.attention != "auto":
                raise
            graphs, refused = self._decomposed(graphs), str(error)
            engines, layers = self._engines(profile, graphs, progress, children)
        return BuiltTarget(profile=profile, graphs=graphs, engines=engines, refused=refused, layers=layers)

    def keep(self, profile: EngineProfile, built: BuiltTarget) -> None:
        """Store what was compiled, for later builds."""
        key = self._key(profile)
        if key:
            own = self._folder / ENGINES_FOLDER / profile.name
            files = [path.relative_to(self._folder).as_posix() for path in sorted(own.iterdir())]
            self._store.keep(_STAGE, key, self._folder, files, built.to_stored())

    def _key(self, profile: EngineProfile) -> str:
        """Empty for what is not stored."""
        if self._store.folder is None or profile.runtime != "tensorrt-rtx":
            return ""
        graphs = self.graphs(profile)
        sources = {name: [file.sha256, file.weights_sha256] for name, file in graphs.items()}
        inputs = {"profile": profile.to_dict(), "config": self._config.to_dict(), "sources": sources}
        return stage_key(_STAGE, inputs)

    def _restored(self, profile: EngineProfile, answer: Mapping[str, Any]) -> BuiltTarget:
        graphs = self.graphs(profile)
        if answer["refused"]:
            graphs = self._decomposed(graphs)
        return BuiltTarget(**answer, profile=profile, graphs=graphs)

    def _decomposed(self, graphs: Mapping[str, GraphFile]) -> dict[str, GraphFile]:
        return {
            name: decomposed_file(file, self._config, self._folder) if file.variant.target else file
            for name, file in graphs.items()
        }

    def _engines(
        self, profile: EngineProfile, graphs: Mapping[str, GraphFile], progress: Progress, children: ChildGroup
    ) -> tuple[dict[str, str], dict[str, Mapping[str, int]]]:
        """Compile what is compiled; the engine files and their layers by graph."""
        stage = f"compile {profile.name}, {graphs['step'].variant.attention} attention"
        engines: dict[str, str] = {}
        layers: dict[str, Mapping[str, int]] = {}
        for done, name in enumerate(COMPILED_GRAPHS):
            progress(stage, done, len(COMPILED_GRAPHS))
            engines[name], layers[name] = _compile(profile, graphs[name], self._config, self._folder, children)
        progress(stage, len(COMPILED_GRAPHS), len(COMPILED_GRAPHS))
        return engines, layers


def _compile(
    profile: EngineProfile, file: GraphFile, config: ModelConfig, folder: Path, children: ChildGroup
) -> tuple[str, Mapping[str, int]]:
    from crt_export.engine.tensorrt.build import build_engine

    name, unroll = file.variant.graph, file.variant.unroll
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
