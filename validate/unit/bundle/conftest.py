"""A small real bundle (one ONNX graph with external weights) and what the tests do with bundles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from crt_export.bundle import stage_bundle
from crt_export.bundle.manifest import sealed
from crt_export.models.declaration import Carried, ModelInfo
from crt_export.runtime.prefill import PrefillPlan

Manifest = dict[str, Any]


@pytest.fixture
def manifest() -> Manifest:
    """What a builder hands to commit for the files of ``write_files``."""
    tensor = {"name": "x", "dtype": "float32", "dims": ["batch", 4]}
    target = {
        "profile": {"name": "ort-cpu-fp32"},
        "graphs": {"step": "graphs/step.fp32.onnx"},
        "engines": {"step": "engines/step.plan"},
        "capacity": 1024,
        "unroll": 4,
        "cache_dtype": "float32",
        "prefill": PrefillPlan(passes=4).to_dict(),
    }
    return {
        "tool": {"name": "crt-export", "version": "0.1.0"},
        "libraries": {"onnx": "1.23.2"},
        "validated": True,
        "config": {"hidden_size": 4},
        "model": ModelInfo(
            model_type="none",
            vocab_size=4,
            hidden_size=4,
            max_position_embeddings=1024,
            tokenizer="none",
            bos_token_id=None,
            eos_token_ids=(),
            carried=Carried(),
        ).to_dict(),
        "checkpoint": {"sha256": "0" * 64},
        "options": {"unroll": 4},
        "contract": {
            "step": {"inputs": [tensor], "outputs": [tensor], "aliases": [["present", "past"]], "continues": []}
        },
        "graphs": [
            {
                "file": "graphs/step.fp32.onnx",
                "graph": "step",
                "precision": "fp32",
                "unroll": None,
                "weights": "graphs/fp32.weights",
                "quantized_matmuls": 0,
                "roles": ["session"],
            }
        ],
        "quantization": {},
        "targets": {"ort-cpu-fp32": target},
        "parity": {"passed": True, "rows": []},
    }


def onnx_bytes(location: str) -> bytes:
    """An ONNX model y = x @ w whose weight lies at ``location``."""
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4, 4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        weight.external_data.add(key=key, value=value)
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "step", [ports[0]], [ports[1]], [weight])
    return onnx.helper.make_model(
        graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)]
    ).SerializeToString()


def _write_files(folder: Path, content: str = "first", location: str = "fp32.weights") -> None:
    (folder / "graphs").mkdir()
    (folder / "engines").mkdir()
    (folder / "graphs" / "fp32.weights").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    (folder / "graphs" / "step.fp32.onnx").write_bytes(onnx_bytes(location))
    (folder / "engines" / "step.plan").write_bytes(b"plan")
    (folder / "report.md").write_text(content, "utf-8")


@pytest.fixture
def write_files() -> Callable[..., None]:
    """``write_files(folder, content="first", location="fp32.weights")``"""
    return _write_files


@pytest.fixture
def build(manifest: Manifest) -> Callable[..., Path]:
    """``build(output, content="first", location=..., **manifest changes)`` makes a real bundle."""

    def build_bundle(output: Path, content: str = "first", location: str = "fp32.weights", **changes: Any) -> Path:
        with stage_bundle(output) as staging:
            _write_files(staging.path, content, location)
            staging.commit({**manifest, **changes})
        return output

    return build_bundle


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[Manifest], object]], None]:
    """``edit_manifest(bundle, change)`` rewrites manifest.json after ``change(manifest)``."""

    def edit(bundle: Path, change: Callable[[Manifest], object]) -> None:
        path = bundle / "manifest.json"
        content = json.loads(path.read_text("utf-8"))
        change(content)
        path.write_text(json.dumps(sealed(content)), "utf-8")

    return edit


PREAMBLE = """
import ctypes, errno, json, os, signal, sys, time
from pathlib import Path
from crt_export.bundle import open_bundle, stage_bundle
from crt_export.bundle import exchange, recovery, write as writing
from crt_export.errors import BundleError
folder = Path(sys.argv[1]); output = folder / "demo"; manifest = json.loads(sys.argv[2])
def write(path, content):
    for name in ("graphs", "engines"):
        (path / name).mkdir()
    for name in ("graphs/step.fp32.onnx", "graphs/fp32.weights", "engines/step.plan", "report.md"):
        (path / name).write_text(content)
def build(content):
    with stage_bundle(output) as staging:
        write(staging.path, content)
        staging.commit(manifest)
"""


@pytest.fixture
def start(tmp_path: Path, manifest: Manifest) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start(script, wrapper=())`` runs Python source after PREAMBLE in its own process, on ``tmp_path``."""

    started: list[subprocess.Popen[str]] = []

    def start_script(script: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        source = PREAMBLE + textwrap.dedent(script)
        command = [*wrapper, sys.executable, "-W", "error", "-c", source, str(tmp_path), json.dumps(manifest)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        started.append(process)
        return process

    yield start_script
    for process in started:
        if process.poll() is None:
            process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.wait()


@pytest.fixture
def run_script(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Like ``start``, but waits for the end, requires success and returns what was printed."""

    def run(script: str, wrapper: tuple[str, ...] = ()) -> str:
        process = start(script, wrapper)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return output

    return run


@pytest.fixture
def bundle(tmp_path: Path, build: Callable[..., Path]) -> Path:
    """A sound bundle."""
    return build(tmp_path / "demo")
