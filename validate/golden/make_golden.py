"""Make the golden files: what the formats of this package are, byte for byte.

::

    python validate/golden/make_golden.py FOLDER            # every format into FOLDER/formats
    python validate/golden/make_golden.py FOLDER bundle-v1  # also the bundle; takes a minute

Every value is computed from integers or drawn with a fixed seed, so the formats come out the same on every machine.
The bundle does not (it holds what PyTorch and ONNX exporters made of a model), and need not: it is kept, never made
anew, because it stands for the bundles that users have.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from crt_export.bundle import SCHEMA_VERSION
from crt_export.bundle.manifest import manifest_text
from crt_export.checkpoint import tensor_shapes, write_checkpoint
from crt_export.config import ModelConfig
from crt_export.graph.weights import write_weights
from crt_export.parity.metrics import Check, measured
from crt_export.parity.report import Comparison, LevelResult, ParityReport, corpus_result
from crt_export.profile import load_profile
from crt_export.runtime import GenerationOptions, Snapshot, load_bundle
from crt_export.runtime.prefill import PrefillPlan
from crt_export.selftest.vectors import RECURRENCE, Vectors, prefill_run
from crt_export.spec import graph_names, graph_spec

BUNDLE = "bundle-v1"
RECORDED = "bundle-v1.recorded"
RECORDED_TARGET = "ort-cpu-fp32"
PROMPT = "The golden bundle"
NEW_TOKENS = 12

CONFIG: dict[str, Any] = {
    "model_type": "context_ready_transformer",
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "correction_intermediate_size": 32,
    "max_position_embeddings": 256,
    "layer_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_layout": "interleaved",
    "unroll_steps": 2,
    "tie_word_embeddings": False,
    "tokenizer": "byte",
    "training_sequence_length": 64,
}


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**CONFIG, **changes})


def numbers(*shape: int, start: int = 0) -> np.ndarray:
    """Exact binary fractions that differ from each other, float32."""
    return ((np.arange(start, start + int(np.prod(shape))) % 509 - 254) / 64).astype(np.float32).reshape(shape)


# --- formats
def manifest(folder: Path) -> None:
    """``manifest.json`` of a bundle of one target."""
    config = model_config()
    graphs = {name: f"graphs/{name}.fp32.onnx" for name in graph_names(config.carried)}
    files = [*graphs.values(), "graphs/fp32.weights"]
    entry = {"precision": "fp32", "unroll": 2, "weights": "graphs/fp32.weights", "quantized_matmuls": 0}
    profile = load_profile("ort-cpu-fp32").with_capacity(64).with_unroll(2)
    content = {
        "tool": {"name": "crt-export", "version": "0.1.0"},
        "libraries": {"python": "3.11.0", "torch": "2.13.0"},
        "validated": False,
        "config": config.to_dict(),
        "model": config.info.to_dict(),
        "checkpoint": {"sha256": "c" * 64, "dtypes": ["F32"]},
        "options": {"targets": ["ort-cpu-fp32"], "text": None, "validated": False, "reference": False},
        "contract": {name: graph_spec(name, config, "float32").to_dict() for name in graphs},
        "graphs": [
            {"file": file, "graph": name, **entry, "roles": list(profile.graph_roles(name, config.carried.iterated))}
            for name, file in graphs.items()
        ],
        "quantization": {},
        "targets": {
            "ort-cpu-fp32": {
                "profile": profile.to_dict(),
                "graphs": graphs,
                "engines": {},
                "capacity": 64,
                "unroll": 2,
                "cache_dtype": "float32",
                "prefill": PrefillPlan(passes=2).to_dict(),
            }
        },
        "parity": None,
        "schema_version": SCHEMA_VERSION,
        "files": {name: {"size": 100 + number, "sha256": f"{number:064x}"} for number, name in enumerate(files)},
    }
    (folder / "manifest.json").write_text(manifest_text(content), encoding="utf-8")


def snapshot(folder: Path) -> None:
    """A session of two rows, one of them empty."""
    cache = numbers(2, 2, 3, 8).astype(np.float16)
    cache[1] = 0
    logits = numbers(2, 256)
    logits[1] = np.nan
    Snapshot(
        bundle="b" * 64,
        target="ort-cuda-fp16",
        tensors={
            "position": np.array([3, 0]),
            "next_tokens": np.array([254, -1]),
            "drawn": np.array([1, 0]),
            "pending": np.array([65, -1]),
            "held": np.array([2, 0]),
            "recent": np.array([[-1] * 1021 + [72, -1, 195], [-1] * 1024]),
            "logits": logits,
            "seen": (np.arange(512).reshape(2, 256) % 7 == 0).astype(np.uint8),
            "state": numbers(2, 1, 16),
            "past_key_values.0.key": cache,
            "past_key_values.0.value": cache[:, ::-1],
        },
    ).save(folder / "session.snapshot")


def checkpoint(folder: Path) -> None:
    """A checkpoint folder."""
    config = model_config(vocab_size=8, tokenizer="none")
    tensors = {name: torch.from_numpy(numbers(*shape)) for name, shape in sorted(tensor_shapes(config).items())}
    write_checkpoint(folder / "checkpoint", config, tensors)


def vectors(folder: Path) -> None:
    """A file of self-test vectors."""
    prompt, steps = 2, 2
    tensors: dict[str, np.ndarray] = {
        "input_ids": np.array([3, 1, 4, 1]),
        "value_divisors.w8a8.0": np.full((2, 8), 2, np.float32),
    }
    for number, run in enumerate((RECURRENCE, prefill_run(2, 2))):
        tensors |= {f"{run}.logits.{index}": numbers(8, start=index + number) for index in range(steps + 1)}
        tensors |= {
            f"{run}.state": numbers(steps + 1, 16, start=number),
            f"{run}.next_tokens": np.array([7, 7, 7]),
            f"{run}.margins": numbers(steps + 1),
            f"{run}.past_key_values.0.key": numbers(2, prompt + steps, 8, start=number),
            f"{run}.past_key_values.0.value": numbers(2, prompt + steps, 8, start=number + 9),
        }
    metadata = {
        "generator": "crt-export 0.1.0",
        "torch": "2.13.0",
        "checkpoint": "c" * 64,
        "ids": "random",
        "seed": "0",
        "prompt": str(prompt),
        "steps": str(steps),
        "logit_stride": "1",
        "limits": '{"fp16":0.01,"fp32":2e-05,"w8":0.1,"w8a8":0.15}',
    }
    (folder / "vectors.safetensors").write_bytes(Vectors(metadata=metadata, tensors=tensors).to_bytes())


def report(folder: Path) -> None:
    """``report.json`` with a regime, a check that held, one that did not, and one that judges nothing."""
    row = Comparison(
        target="ort-cpu-int8",
        runtime="onnxruntime",
        graph="step",
        precision="w8",
        regime="step",
        label="step",
        tokens=4096,
        steps=256,
        nll=1.25,
        reference_nll=1.0,
        positions=(0, 256),
        checks=(
            measured("delta_nll", "step: delta_nll", 0.25, interval=(0.125, 0.375), limit=0.002, precision="w8"),
            measured("mean_kl", "step: mean_kl", float("nan")),
        ),
    )
    checks = (
        measured("tensor_error", "step: logits", 0.5, limit=1.0, precision="w8"),
        measured("tensor_error", "step: state", 2.0, limit=1.0, precision="w8", where="at step 3"),
        Check(name="step: text"),
    )
    level = LevelResult(
        level="one-step", target="ort-cpu-int8", checks=checks, data={"positions": [0, 7]}, notes=("a",)
    )
    whole = ParityReport(
        levels=(level, corpus_result("ort-cpu-int8", [row])),
        tolerances={"near_tie_margin": 0.01},
        text={"source": "text", "sha256": "d" * 64, "offset": 0, "tokens": 4097, "windows": 16, "window": 256},
        notes=("a note",),
        method="how",
        versions={"torch": "2.13.0"},
    )
    (folder / "report.json").write_text(json.dumps(whole.to_dict(), indent=1) + "\n", encoding="utf-8")


def weights(folder: Path) -> None:
    """``fp32.weights`` of two graphs that share weights: names sorted, offsets at multiples of a page."""

    def graph(*names: str) -> ir.Model:
        tensors = {name: ir.tensor(numbers(3, 5, start=len(name)), name=name) for name in names}
        values = [ir.Value(name=name, const_value=tensor) for name, tensor in tensors.items()]
        return ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)

    graphs = {"step": graph("embed.weight", "rope_cos"), "head": graph("lm_head.weight", "embed.weight", "scalar")}
    written = write_weights(graphs, folder / "fp32.weights")
    content = written.path.read_bytes()
    layout = {
        name: {"offset": at, "length": size, "sha256": hashlib.sha256(content[at : at + size]).hexdigest()}
        for name, (at, size) in written.entries.items()
    }
    (folder / "fp32.weights.json").write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")


FORMATS: dict[str, Callable[[Path], None]] = {
    "manifest": manifest,
    "snapshot": snapshot,
    "checkpoint": checkpoint,
    "vectors": vectors,
    "report": report,
    "weights": weights,
}


# --- the bundle
def bundle_v1(folder: Path) -> None:
    """A complete bundle, built as a user builds one, and what it said when it was built."""
    from crt_export.pipeline import BuildOptions, build

    model = folder / "model"
    config = model_config()
    generator = torch.Generator().manual_seed(2026)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if name == "embed.weight":
            return noise * 0.5
        if len(shape) == 2:
            return noise * 0.5 / shape[1] ** 0.5
        return 1 + noise * 0.1 if name.endswith("norm.weight") else noise * 0.1

    write_checkpoint(model, config, {name: weight(name, shape) for name, shape in tensor_shapes(config).items()})
    targets = ("ort-cpu-fp32", "ort-cpu-int8")
    build(BuildOptions(checkpoint=model, output=folder / BUNDLE, targets=targets, capacity=256))
    for file in sorted(model.iterdir()):
        file.unlink()
    model.rmdir()
    record(folder / BUNDLE, folder / RECORDED)


def record(bundle: Path, folder: Path) -> None:
    """Tokens that the bundle generates, and a snapshot half-way."""
    folder.mkdir()
    with load_bundle(bundle) as opened:
        prompt = opened.tokenizer.encode_prompt(PROMPT)
        session = opened.session(RECORDED_TARGET)
        generation = session.generate([prompt], GenerationOptions(max_new_tokens=NEW_TOKENS))
        for count, _ in enumerate(generation, start=1):
            if count == NEW_TOKENS // 2:
                session.snapshot().save(folder / "session.snapshot")
        tokens = list(generation.tokens[0])
    values = {"prompt": PROMPT, "target": RECORDED_TARGET, "tokens": tokens, "tokens_before_snapshot": NEW_TOKENS // 2}
    (folder / "tokens.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    formats = folder / "formats"
    formats.mkdir(parents=True, exist_ok=True)
    for make in FORMATS.values():
        make(formats)
    if BUNDLE in arguments[1:]:
        bundle_v1(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
