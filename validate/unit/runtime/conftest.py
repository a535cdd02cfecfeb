"""Two tiny bundles with really exported graphs, made once and shared by every worker of a test run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from crt_export.bundle import MANIFEST_NAME, stage_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.graph import export_graph, write_graph, write_weights
from crt_export.model import Model, model_from_checkpoint
from crt_export.profile import DimRange, EngineProfile, load_profile
from crt_export.runtime import Bundle, load_bundle
from crt_export.spec import graph_spec

OVERFLOWING_TOKEN = 7
CHUNK = 4
UNROLL = 3


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """An opened bundle and the PyTorch model it was exported from."""

    bundle: Bundle
    model: Model

    @property
    def passes(self) -> int:
        """K of the exported prefill."""
        return UNROLL if self.model.config.recurrent else 1


@pytest.fixture(scope="session")
def overflowing_token() -> int:
    return OVERFLOWING_TOKEN


@pytest.fixture(scope="session")
def make_runnable(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Runnable]:
    def make(name: str, **changes: Any) -> Runnable:
        checkpoint = load_checkpoint(make_checkpoint(edit=_overflow, **changes))
        model = model_from_checkpoint(checkpoint)
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        output = shared / f"runtime-{name}"
        with FileLock(shared / f"runtime-{name}.lock"):
            if not (output / MANIFEST_NAME).is_file():
                _write_bundle(output, model, checkpoint.sha256)
        return Runnable(bundle=load_bundle(output, allow_unvalidated=True), model=model)

    return make


@pytest.fixture(scope="session")
def crt(make_runnable: Callable[..., Runnable]) -> Iterator[Runnable]:
    """A recurrent model of one layer, prefill unrolled three times."""
    runnable = make_runnable("crt", num_hidden_layers=1, unroll_steps=UNROLL)
    with runnable.bundle:
        yield runnable


@pytest.fixture(scope="session")
def plain(make_runnable: Callable[..., Runnable]) -> Iterator[Runnable]:
    """A plain transformer of two layers, with an end-of-sequence token."""
    runnable = make_runnable("plain", model_type="transformer", num_hidden_layers=2, eos_token_id=3)
    with runnable.bundle:
        yield runnable


@pytest.fixture(params=["crt", "plain"])
def either(request: pytest.FixtureRequest) -> Runnable:
    """Both kinds of model, one after the other."""
    return request.getfixturevalue(request.param)


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
    graphs = {name: export_graph(model, name, unroll=config.unroll_steps) for name in ("step", "prefill")}
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
