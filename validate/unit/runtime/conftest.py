"""Tiny bundles with really exported graphs, made once and shared by every worker of a test run.

Every test that takes ``crt``, ``plain``, ``either`` or ``windowed`` runs once per engine of ``ENGINES``. To run the
whole suite over another one, add its opener there: a function with the signature of
``crt_export.runtime.opening.engine_from_target``, which gets one of the bundle's ONNX targets and returns an
:class:`crt_export.engine.base.Engine` that runs the target's graphs (``files.graph(target.graphs["step"])`` is the
checked ONNX file). Sessions of many capacities are opened on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from crt_export.bundle import MANIFEST_NAME, BundleFiles, open_bundle
from crt_export.engine.base import Buffer, Engine, Program
from crt_export.engine.onnxruntime import DeviceBuffer
from crt_export.engine.ort import import_onnxruntime
from crt_export.models.base import LanguageModel
from crt_export.models.declaration import ModelInfo
from crt_export.runtime import Bundle, Session
from crt_export.runtime.bundle import OpenEngine
from crt_export.runtime.opening import Target, engine_from_target

TARGET = "ort-cpu-fp32"
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
        self.one_graph = engine.one_graph

    def program(self, graph: str) -> Program:
        return self._engine.program(graph)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return DeviceBuffer(import_onnxruntime(), "cpu", shape, dtype)

    def close(self) -> None:
        self._engine.close()


def _in_device_memory(files: BundleFiles, target: Target, model: ModelInfo, threads: int) -> Engine:
    return DeviceMemoryEngine(engine_from_target(files, target, model, threads))


def _tensorrt(files: BundleFiles, target: Target, model: ModelInfo, threads: int) -> Engine:
    """TensorRT's session on a recording machine: see validate/unit/engine/recording_engine.py."""
    return importlib.import_module("recording_engine").open_recorded_engine(files, target, model, threads)


ENGINES: dict[str, OpenEngine] = {
    "onnxruntime": engine_from_target,
    "onnxruntime-device-memory": _in_device_memory,
    "tensorrt": _tensorrt,
}


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """An opened bundle and the PyTorch model it was exported from."""

    bundle: Bundle
    model: LanguageModel

    @property
    def passes(self) -> int:
        """K of the exported prefill."""
        return self.model.carried.passes

    def session(self, **options: Any) -> Session:
        """A session on the target of one thread."""
        return self.bundle.session(options.pop("target", TARGET), **options)

    @staticmethod
    def ids(count: int, seed: int = 0) -> list[int]:
        """Token ids above the special ones of the fixtures."""
        return np.random.default_rng(seed).integers(32, 256, count).tolist()

    def logits(self, parts: list[list[int]], steps: list[int], passes: int | None = None) -> np.ndarray:
        """Logits [vocab] of PyTorch after prefilling the parts one by one, then stepping."""
        state, hidden = None, None
        with torch.no_grad():
            for part in parts:
                done, state, _ = self.model.unroll(torch.tensor([part]), passes or self.passes, state)
                hidden = done.hidden
            for token in steps:
                hidden, state = self.model.step(torch.tensor([[token]]), state or self.model.start(1))
            assert hidden is not None
            return self.model.head(hidden[:, -1]).float().numpy()[0]

    @staticmethod
    def caches(session: Session) -> list[np.ndarray]:
        """Every cache of a session, [batch, heads, capacity, head_dim]."""
        return list(session._guard.decoder.tensors.caches(session.capacity).values())

    @staticmethod
    def cache_buffers(session: Session) -> list[Buffer]:
        """The memory of every cache, row after row where rows have caches of their own."""
        return [buffer for group in session._guard.decoder.tensors._caches._groups for buffer in group.buffers.values()]


@pytest.fixture(scope="session", params=ENGINES)
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    """What loads the graphs: every test of the suite runs over each."""
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def make_runnable(tiny_bundle: Callable[..., tuple[Path, LanguageModel]]) -> Callable[..., Runnable]:
    def make(name: str, open_engine: OpenEngine, **changes: Any) -> Runnable:
        path, model = tiny_bundle(name, **changes)
        return Runnable(bundle=Bundle(open_bundle(path, allow_unvalidated=True), open_engine), model=model)

    return make


@pytest.fixture(scope="session")
def crt(make_runnable: Callable[..., Runnable], open_engine: OpenEngine) -> Iterator[Runnable]:
    """A recurrent model of one layer, prefill unrolled three times."""
    runnable = make_runnable("crt", open_engine, num_hidden_layers=1, unroll_steps=UNROLL)
    with runnable.bundle:
        yield runnable


@pytest.fixture(scope="session")
def crt_cpu(make_runnable: Callable[..., Runnable]) -> Iterator[Runnable]:
    """The bundle of ``crt`` on ONNX Runtime alone, for what does not depend on the engine."""
    runnable = make_runnable("crt", engine_from_target, num_hidden_layers=1, unroll_steps=UNROLL)
    with runnable.bundle:
        yield runnable


@pytest.fixture(scope="session")
def crt_path(tiny_bundle: Callable[..., tuple[Path, LanguageModel]]) -> Path:
    """The bundle of ``crt``, for what does not depend on the engine. Read-only."""
    return tiny_bundle("crt", num_hidden_layers=1, unroll_steps=UNROLL)[0]


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


@pytest.fixture(scope="session")
def recorded_path(make_runnable: Callable[..., Runnable]) -> Path:
    """The bundle of ``crt`` with a further target, ``recorded``: engines for the recording TensorRT, capacity 32."""
    bundles = importlib.import_module("recording_bundle")
    with make_runnable("crt", engine_from_target, num_hidden_layers=1, unroll_steps=UNROLL).bundle as bundle:
        source = bundle.files.path
    output = source.with_name(f"{source.name}-recorded")
    with FileLock(output.with_suffix(".lock")):
        if not (output / MANIFEST_NAME).is_file():
            bundles.add_recorded_target(source, output, [bundles.recorded_profile(32, 32)])
    return output


@pytest.fixture(params=["crt", "plain"])
def either(request: pytest.FixtureRequest, crt: Runnable, plain: Runnable) -> Runnable:
    """Both kinds of model, one after the other."""
    return {"crt": crt, "plain": plain}[request.param]
