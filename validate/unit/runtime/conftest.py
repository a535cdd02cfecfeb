"""Tiny bundles with really exported graphs, made once and shared by every worker of a test run.

Every test that takes ``crt``, ``plain``, ``either`` or ``windowed`` runs once per engine of ``ENGINES``. To run the
whole suite over another one, add its opener there: a function with the signature of
``crt_export.runtime.opening.engine_from_target``, which gets one of the bundle's ONNX targets and returns an
:class:`crt_export.engine.base.Engine` that runs the target's graphs (``files.graph(target.graphs["step"])`` is the
checked ONNX file). Sessions of many capacities are opened on it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from crt_export.bundle import MANIFEST_NAME, BundleFiles, open_bundle, stage_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.config import ModelConfig
from crt_export.engine.base import Buffer, Engine, Program
from crt_export.engine.ort import import_onnxruntime
from crt_export.engine.ort_memory import DeviceBuffer
from crt_export.graph import export_graph, write_graph, write_weights
from crt_export.model import Model, model_from_checkpoint
from crt_export.profile import DimRange, EngineProfile, load_profile
from crt_export.runtime import Bundle, Session
from crt_export.runtime.bundle import OpenEngine
from crt_export.runtime.opening import Target, engine_from_target
from crt_export.spec import graph_names, graph_spec

TARGET = "ort-cpu-fp32"
OVERFLOWING_TOKEN = 7
CHUNK = 4
UNROLL = 3
WINDOW = 6


class DeviceMemoryEngine:
    """ONNX Runtime on device memory (here the CPU's): a read is a copy, and logits stay until they are asked for."""

    host_memory = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_tokens = engine.max_tokens
        self.max_batch = engine.max_batch
        self.fixed_capacity = engine.fixed_capacity

    def program(self, graph: str) -> Program:
        return self._engine.program(graph)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return DeviceBuffer(import_onnxruntime(), "cpu", shape, dtype)

    def close(self) -> None:
        self._engine.close()


def _in_device_memory(files: BundleFiles, target: Target, config: ModelConfig, threads: int) -> Engine:
    return DeviceMemoryEngine(engine_from_target(files, target, config, threads))


ENGINES: dict[str, OpenEngine] = {
    "onnxruntime": engine_from_target,
    "onnxruntime-device-memory": _in_device_memory,
}


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """An opened bundle and the PyTorch model it was exported from."""

    bundle: Bundle
    model: Model

    @property
    def passes(self) -> int:
        """K of the exported prefill."""
        return self.model.config.unroll_steps if self.model.config.recurrent else 1

    def session(self, **options: Any) -> Session:
        """A session on the target of one thread."""
        return self.bundle.session(options.pop("target", TARGET), **options)

    @staticmethod
    def ids(count: int, seed: int = 0) -> list[int]:
        """Token ids above the special ones of the fixtures."""
        return np.random.default_rng(seed).integers(32, 256, count).tolist()

    def logits(self, parts: list[list[int]], steps: list[int], passes: int | None = None) -> np.ndarray:
        """Logits [vocab] of PyTorch after prefilling the parts one by one, then stepping."""
        carry, h = None, None
        with torch.no_grad():
            for part in parts:
                h, carry, _ = self.model.unroll(torch.tensor([part]), passes or self.passes, carry)
            for token in steps:
                h, carry = self.model.step(torch.tensor([[token]]), carry if carry is not None else self.model.start(1))
            assert h is not None
            return self.model.head(h[:, -1]).float().numpy()[0]

    @staticmethod
    def caches(session: Session) -> list[np.ndarray]:
        """Every cache of a session, [batch, heads, capacity, cache_head_dim]."""
        return list(session._guard.decoder.tensors.caches(session.capacity).values())


@pytest.fixture(scope="session")
def overflowing_token() -> int:
    return OVERFLOWING_TOKEN


@pytest.fixture(scope="session", params=ENGINES)
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    """What loads the graphs: every test of the suite runs over each."""
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def make_runnable(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Runnable]:
    def make(name: str, open_engine: OpenEngine, **changes: Any) -> Runnable:
        checkpoint = load_checkpoint(make_checkpoint(edit=_overflow, **changes))
        model = model_from_checkpoint(checkpoint)
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        output = shared / f"runtime-{name}"
        with FileLock(shared / f"runtime-{name}.lock"):
            if not (output / MANIFEST_NAME).is_file():
                _write_bundle(output, model, checkpoint.sha256)
        return Runnable(bundle=Bundle(open_bundle(output, allow_unvalidated=True), open_engine), model=model)

    return make


@pytest.fixture(scope="session")
def crt(make_runnable: Callable[..., Runnable], open_engine: OpenEngine) -> Iterator[Runnable]:
    """A recurrent model of one layer, prefill unrolled three times."""
    runnable = make_runnable("crt", open_engine, num_hidden_layers=1, unroll_steps=UNROLL)
    with runnable.bundle:
        yield runnable


@pytest.fixture(scope="session")
def plain(make_runnable: Callable[..., Runnable], open_engine: OpenEngine) -> Iterator[Runnable]:
    """A plain transformer of two layers, with an end-of-sequence token."""
    runnable = make_runnable("plain", open_engine, model_type="transformer", num_hidden_layers=2, eos_token_id=3)
    with runnable.bundle:
        yield runnable


@pytest.fixture(scope="session")
def windowed(make_runnable: Callable[..., Runnable], open_engine: OpenEngine) -> Iterator[Runnable]:
    """A recurrent model of two layers whose tokens see the latest ``WINDOW`` keys."""
    runnable = make_runnable("windowed", open_engine, num_hidden_layers=2, unroll_steps=2, sliding_window=WINDOW)
    with runnable.bundle:
        yield runnable


@pytest.fixture(params=["crt", "plain"])
def either(request: pytest.FixtureRequest, crt: Runnable, plain: Runnable) -> Runnable:
    """Both kinds of model, one after the other."""
    return {"crt": crt, "plain": plain}[request.param]


def _overflow(tensors: dict[str, torch.Tensor]) -> None:
    """Make one token, and no other, overflow float32: its h is infinite, though every weight is finite.

    Its embedding lies on channel 0 alone, so LayerNorm gives sqrt(31) there, where other tokens stay below 4;
    one neuron fires only above that, and its weight out is the largest there is.
    """
    tensors["embed.weight"][OVERFLOWING_TOKEN] = 0
    tensors["embed.weight"][OVERFLOWING_TOKEN, 0] = 1000
    tensors["layers.0.mlp_norm.weight"][0] = 1
    tensors["layers.0.mlp_norm.bias"][0] = 0
    tensors["layers.0.mlp.up.weight"][0] = 0
    tensors["layers.0.mlp.up.weight"][0, 0] = 1e30
    tensors["layers.0.mlp.up.bias"][0] = -4.2e30
    tensors["layers.0.mlp.down.weight"][:, 0] = 3e38


def _write_bundle(output: Path, model: Model, checkpoint_hash: str) -> None:
    config = model.config
    names = [name for name in graph_names(config) if name != "head"]
    graphs = {name: export_graph(model, name, unroll=config.unroll_steps) for name in names}
    files = {name: f"graphs/{name}.fp32.onnx" for name in graphs}
    with stage_bundle(output) as staging:
        (staging.path / "graphs").mkdir()
        weights = write_weights(graphs, staging.path / "graphs" / "fp32.weights")
        for name, graph in graphs.items():
            write_graph(graph, staging.path / files[name], weights)
        target = {
            "graphs": files,
            "engines": {},
            "capacity": None,
            "unroll": config.unroll_steps,
            "head_dim": config.head_dim,
            "cache_head_dim": config.head_dim,
            "cache_dtype": "float32",
        }
        profiles = {profile.name: profile for profile in (_whole(), _chunked(), load_profile("rtx-sm80-fp16"))}
        staging.commit(
            {
                "tool": {"name": "crt-export", "version": "0.1.0"},
                "libraries": {},
                "validated": False,
                "config": config.to_dict(),
                "checkpoint": {"sha256": checkpoint_hash},
                "options": {},
                "contract": {name: graph_spec(name, config, "float32").to_dict() for name in graphs},
                "graphs": [
                    {
                        "file": files[name],
                        "graph": name,
                        "precision": "fp32",
                        "unroll": config.unroll_steps,
                        "weights": "graphs/fp32.weights",
                        "quantized_matmuls": 0,
                    }
                    for name in graphs
                ],
                "targets": {
                    **{name: {**target, "profile": p.to_dict()} for name, p in profiles.items()},
                    "broken": {**target, "profile": _whole().to_dict(), "cache_dtype": "float16"},
                },
                "parity": None,
            }
        )


def _whole() -> EngineProfile:
    """The tracked CPU profile, for one thread and a small cache."""
    return dataclasses.replace(load_profile("ort-cpu-fp32"), threads=1, capacity=32, seq=DimRange(1, 8, 32))


def _chunked() -> EngineProfile:
    """A profile whose prefill takes at most ``CHUNK`` tokens per call."""
    return dataclasses.replace(_whole(), name="chunked", seq=DimRange(1, CHUNK, CHUNK))
