"""Give a bundle a target whose engines the recording TensorRT runs: the bundle's own FP32 graphs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from recording_tensorrt import VERSION, recorded_engine

from crt_export.bundle import MANIFEST_NAME, stage_bundle
from crt_export.models.declaration import ModelInfo
from crt_export.profile import DimRange, EngineProfile, load_profile
from crt_export.spec import graph_spec

TARGET = "recorded"
GRAPHS = ("step", "prefill")


def recorded_profile(capacity: int, most_tokens: int, *, name: str = TARGET, batch: int = 4) -> EngineProfile:
    """The TensorRT-RTX profile for a small cache; the recording executes FP32 graphs under it."""
    seq = DimRange(1, most_tokens, most_tokens)
    return dataclasses.replace(
        load_profile("rtx-sm80-fp16"), name=name, capacity=capacity, seq=seq, batch=DimRange(1, 1, batch)
    )


def add_recorded_target(
    source: Path, output: Path, profiles: list[EngineProfile], *, base: str = "ort-cpu-fp32"
) -> None:
    """Copy a bundle with one more target per profile; each has engines for step and prefill.

    Args:
        source: A bundle.
        output: Where the copy will lie; the engines name its graphs.
        profiles: What to add.
        base: The target of the bundle whose graphs the engines execute.
    """
    manifest = json.loads((source / MANIFEST_NAME).read_text())
    graphs = manifest["targets"][base]
    model = ModelInfo.from_dict(manifest["model"])
    with stage_bundle(output) as staging:
        for name in manifest["files"]:
            (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, staging.path / name)
        for profile in profiles:
            manifest["targets"][profile.name] = _target(graphs, profile, model, staging.path, output)
        staging.commit({key: value for key, value in manifest.items() if key not in ("files", "schema_version")})


def _target(
    base: dict[str, Any], profile: EngineProfile, model: ModelInfo, folder: Path, output: Path
) -> dict[str, Any]:
    engines = {}
    for graph in GRAPHS:
        unroll = base["unroll"] if graph == "prefill" else 1
        name = f"engines/{profile.name}/{graph}.engine"
        contract = graph_spec(graph, model, base["cache_dtype"], profile.capacity)
        ranges = {"batch": (profile.batch.min, profile.batch.max), "seq": (profile.seq.min, profile.seq.max)}
        plan, tensors = recorded_engine(output / base["graphs"][graph], contract, ranges)
        sidecar = {
            "graph": graph,
            "unroll": unroll or 1,
            "runtime": profile.runtime,
            "runtime_version": VERSION,
            "compute_capability": profile.compute_capability,
            "precision": profile.precision,
            "capacity": profile.capacity,
            "options": profile.to_dict()["options"],
            **tensors,
        }
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(plan)
        (folder / name).with_suffix(".json").write_text(json.dumps(sidecar))
        engines[graph] = name
    return {**base, "profile": profile.to_dict(), "engines": engines, "capacity": profile.capacity}
