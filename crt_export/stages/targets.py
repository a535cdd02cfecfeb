"""Stage: what one target deploys: its graphs, and the engines that TensorRT compiles of them.

Compilers that need no GPU run side by side, and report and fail as if one thing were done after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from crt_export.child_process import UNGROUPED, ChildGroup
from crt_export.config import ModelConfig
from crt_export.errors import NoEngineError
from crt_export.profile import EngineProfile
from crt_export.progress import Progress
from crt_export.quantize.linears import expected_matmuls
from crt_export.stages.graphs import GraphFile, GraphVariant, decomposed_file, variants_of_profile
from crt_export.stages.store import NO_STORE, StageStore, stage_key

ENGINES_FOLDER = "engines"
_STAGE = "engines"
#: The graphs an engine is compiled of; prefill_pass and head serve validation and stay ONNX.
COMPILED_GRAPHS = ("step", "prefill")

Result = TypeVar("Result")
#: What is to be done: it reports to the progress given and starts its processes in the group.
Task = Callable[[Progress, ChildGroup], Result]
_POLL_SECONDS = 0.1
#: A third would gain little and need gigabytes.
_MOST_COMPILERS = 2
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class BuiltTarget:
    """One target as it stands in the bundle.

    Attributes:
        profile: Resolved for this model.
        graphs: Per graph name; what is validated.
        engines: Engine file per compiled graph.
        engine_digests: SHA-256 of the engine files by name.
        refused: What the compiler said to fused attention, where that is why it is decomposed; else empty.
    """

    profile: EngineProfile
    graphs: Mapping[str, GraphFile]
    engines: Mapping[str, str] = field(default_factory=dict)
    engine_digests: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def attention(self) -> str:
        """``fused`` or ``decomposed``."""
        return self.graphs["step"].variant.attention

    def to_dict(self) -> dict[str, Any]:
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

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of its large files by name, as they were hashed while they were written."""
        graphs = {name: digest for file in self.graphs.values() for name, digest in file.digests.items()}
        return {**graphs, **self.engine_digests}


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
            return BuiltTarget(profile=profile, graphs=self.graphs(profile))
        key = self._key(profile)
        stored = self._store.restore_as(_STAGE, key, self._folder, partial(self._restored, profile)) if key else None
        if stored is not None:
            progress(f"compile {profile.name}: as stored by an earlier build", 0, 0)
        return stored

    def compile(self, profile: EngineProfile, progress: Progress, children: ChildGroup) -> BuiltTarget:
        """Compile it, with fused attention where its runtime has a kernel."""
        graphs, refused = self.graphs(profile), ""
        try:
            digests = self._engines(profile, graphs, progress, children)
        except NoEngineError as error:
            # Which shapes have a fused kernel is known to the compiler alone: "auto" means to try, then to do without.
            # Any other BuildError (a warning, a layer of the wrong precision) is final.
            if graphs["step"].variant.attention == "decomposed" or profile.attention != "auto":
                raise
            graphs, refused = self._decomposed(graphs), str(error)
            digests = self._engines(profile, graphs, progress, children)
        engines: dict[str, str] = dict(zip(COMPILED_GRAPHS, digests, strict=True))
        return BuiltTarget(profile=profile, graphs=graphs, engines=engines, engine_digests=digests, refused=refused)

    def keep(self, profile: EngineProfile, built: BuiltTarget) -> None:
        """Store what was compiled, for later builds."""
        key = self._key(profile)
        if key:
            own = self._folder / ENGINES_FOLDER / profile.name
            files = [path.relative_to(self._folder).as_posix() for path in sorted(own.iterdir())]
            answer = {"engines": built.engines, "engine_digests": built.engine_digests, "refused": built.refused}
            self._store.keep(_STAGE, key, self._folder, files, answer, built.engine_digests)

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
    ) -> dict[str, str]:
        """Compile what is compiled; SHA-256 by engine file."""
        stage = f"compile {profile.name}, {graphs['step'].variant.attention} attention"
        digests: dict[str, str] = {}
        for done, name in enumerate(COMPILED_GRAPHS):
            progress(stage, done, len(COMPILED_GRAPHS))
            digests |= _compile(profile, graphs[name], self._config, self._folder, children)
        progress(stage, len(COMPILED_GRAPHS), len(COMPILED_GRAPHS))
        return digests


def _compile(
    profile: EngineProfile, file: GraphFile, config: ModelConfig, folder: Path, children: ChildGroup
) -> dict[str, str]:
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
    return {f"{stem}.engine": hashlib.sha256(compiled.plan).hexdigest()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def run_side_by_side(
    tasks: Mapping[str, Task[Result]],
    workers: int,
    progress: Progress,
    finished: Callable[[str, Result], None],
) -> None:
    """Run tasks in threads of their own until all are done or one fails, whose processes then end at once.

    Args:
        tasks: By name.
        workers: How many run at a time.
        progress: Told from this thread: the stages of all that run, their units added up.
        finished: Called from this thread with the name and result of every task.

    Raises:
        BaseException: Whatever the first task to fail, ``progress`` or ``finished`` raised, Ctrl-C among them. No
            thread and no process is left then.
    """
    reports: SimpleQueue[tuple[str, str, int, int]] = SimpleQueue()
    stages: dict[str, tuple[str, int, int]] = {}
    children = ChildGroup()
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        running = {pool.submit(task, _reporter(name, reports), children): name for name, task in tasks.items()}
        while running:
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            while not reports.empty():
                name, stage, units, total = reports.get()
                stages[name] = (stage, units, total)
                _report(stages, progress)
            for future in done:
                finished(running.pop(future), future.result())
    finally:
        children.end()
        pool.shutdown(wait=True, cancel_futures=True)


def compilers_at_once(weights: Iterable[Path]) -> int:
    """How many compilers this machine has cores and memory for, one at least.

    Args:
        weights: Weight files of the graphs that are compiled.
    """
    # Measured with TensorRT-RTX 1.7: 0.4 GB without weights, 2.0 GB with 0.3 GB of them.
    each = 2**30 + 4 * max((path.stat().st_size for path in weights), default=0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(cores, _MOST_COMPILERS, _available_memory() // each))


def _available_memory() -> int:
    """Bytes that can be had without swapping, of a container's share too; 0 where the system does not say."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    machine = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or "max": no limit
        return machine
    return max(0, min(machine, limit - used))


def _reporter(name: str, reports: SimpleQueue[tuple[str, str, int, int]]) -> Progress:
    def report(stage: str, done: int, total: int) -> None:
        reports.put((name, stage, done, total))

    return report


def _report(stages: Mapping[str, tuple[str, int, int]], progress: Progress) -> None:
    phrases, done, total = zip(*stages.values(), strict=True)
    progress("; ".join(phrases), sum(done), sum(total))
