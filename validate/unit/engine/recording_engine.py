"""Open a bundle's ONNX target as if it had been compiled: the session tests run over TensorRT's session like this.

Unlike genuine engines these take any capacity and batch, because the session tests open sessions of many sizes.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from recording_device import RecordingDevice
from recording_tensorrt import VERSION, RecordingTensorRT, recorded_engine

from crt_export.bundle import BundleFiles
from crt_export.engine.base import Engine
from crt_export.engine.onnxruntime import load_graph
from crt_export.engine.tensorrt.engine import Machine, TensorRTEngine
from crt_export.engine.tensorrt.sidecar import EngineFile
from crt_export.machine import Gpu
from crt_export.models.declaration import ModelInfo
from crt_export.profile import EngineProfile, load_profile
from crt_export.runtime.opening import Target, check_contract, engine_from_target
from crt_export.spec import GraphSpec, graph_spec

A100 = Gpu(name="A100", compute_capability=80)
_MOST_ROWS = 64


class RecordedEngine(TensorRTEngine):
    """The session's engine on a recording machine; complains when it is closed about what was misused there."""

    def __init__(self, machine: Machine, files: dict[str, EngineFile], target: Target) -> None:
        super().__init__(machine, files, _profile(target))
        self.fixed_capacity = None
        self.recorded = machine

    def close(self) -> None:
        super().close()
        assert self.recorded.device.misuses == []  # type: ignore[attr-defined]


def open_recorded_engine(files: BundleFiles, target: Target, model: ModelInfo, threads: int) -> Engine:
    """As :func:`crt_export.runtime.opening.engine_from_target` does, but ONNX targets go to a recording machine."""
    if target.profile.compiled:
        return engine_from_target(files, target, model, threads)
    device = RecordingDevice()
    machine = Machine(api=RecordingTensorRT(device), device=device, gpu=A100)
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            graph: _compile(files.graph(name), graph, Path(folder), target, model)
            for graph, name in target.graphs.items()
        }
        engine = RecordedEngine(machine, engines, target)
    check_contract({graph: engine.program(graph) for graph in engines}, target, model)
    return engine


def _profile(target: Target) -> EngineProfile:
    return dataclasses.replace(
        load_profile("rtx-sm80-fp16"), name=target.name, capacity=target.capacity, seq=target.profile.seq
    )


def _compile(onnx: Path, graph: str, folder: Path, target: Target, model: ModelInfo) -> EngineFile:
    loaded = load_graph(onnx, threads=1)
    aliases = graph_spec(graph, model, "float32").aliases
    contract = GraphSpec(name=graph, inputs=loaded.inputs, outputs=loaded.outputs, aliases=aliases)
    profile = _profile(target)
    ranges = {
        "batch": (1, _MOST_ROWS),
        "seq": (1, target.profile.seq.max),
        "capacity": (1, model.max_position_embeddings),
    }
    plan, tensors = recorded_engine(onnx, contract, ranges)
    sidecar = {
        "graph": graph,
        "unroll": 1,
        "runtime": profile.runtime,
        "runtime_version": VERSION,
        "options": {"ampere_plus": False, "version_compatible": False},
        "compute_capability": profile.compute_capability,
        "precision": profile.precision,
        "capacity": profile.capacity,
        **tensors,
    }
    path = folder / f"{graph}.engine"
    path.write_bytes(plan)
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    beside = path.with_suffix(".json")
    return EngineFile(
        graph=graph,
        path=path,
        sidecar=beside,
        read_plan=path.read_bytes,
        read_sidecar=beside.read_bytes,
        contract=contract,
        unroll=1,
    )
