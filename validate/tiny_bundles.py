"""Tiny bundles with really exported graphs, written without the stages of a build.

Their targets: ``ort-cpu-fp32``; ``chunked``, whose prefill takes ``CHUNK`` tokens per call; ``rtx-sm80-fp16`` without
an engine; ``broken``, which promises another dtype of the caches than its graphs have.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from crt_export.bundle import stage_bundle
from crt_export.checkpoint import Checkpoint
from crt_export.graph.export import GraphExporter
from crt_export.graph.weights import write_graph, write_weights
from crt_export.models.base import LanguageModel
from crt_export.profile import DimRange, EngineProfile, load_profile
from crt_export.runtime.prefill import PrefillPlan
from crt_export.spec import graph_names, graph_spec
from crt_export.stages.vectors import write_vectors
from crt_export.tokenizer import load_tokenizer

OVERFLOWING_TOKEN = 7
CHUNK = 4


def overflow(tensors: dict[str, torch.Tensor]) -> None:
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


def write_tiny_bundle(output: Path, model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Write a bundle of one precision whose graphs the targets share."""
    config, exporter = model.config, GraphExporter(model)
    unroll = config.carried.passes
    names = [name for name in graph_names(config.carried) if name != "head"]
    graphs = {name: exporter.graph(name, unroll=unroll) for name in names}
    files = {name: f"graphs/{name}.fp32.onnx" for name in graphs}
    with stage_bundle(output) as staging:
        (staging.path / "graphs").mkdir()
        weights = write_weights(graphs, staging.path / "graphs" / "fp32.weights")
        for name, graph in graphs.items():
            write_graph(graph, staging.path / files[name], weights)
        target = {
            "graphs": files,
            "engines": {},
            "capacity": config.max_position_embeddings,
            "unroll": unroll,
            "cache_dtype": "float32",
            "prefill": PrefillPlan(passes=unroll).to_dict(),
        }
        profiles = {profile.name: profile for profile in (_whole(), _chunked(), load_profile("rtx-sm80-fp16"))}
        resolved = [profile.with_unroll(unroll) for profile in profiles.values()]
        write_vectors(checkpoint, load_tokenizer(checkpoint.path, config), resolved, None, None, staging.path)
        staging.commit(
            {
                "tool": {"name": "crt-export", "version": "0.1.0"},
                "libraries": {},
                "validated": False,
                "config": config.to_dict(),
                "model": config.info.to_dict(),
                "checkpoint": {"sha256": checkpoint.sha256, "parameters": config.parameter_count},
                "options": {},
                "contract": {name: graph_spec(name, config, "float32").to_dict() for name in graphs},
                "graphs": [
                    {
                        "file": files[name],
                        "graph": name,
                        "precision": "fp32",
                        "unroll": unroll,
                        "weights": "graphs/fp32.weights",
                        "quantized_matmuls": 0,
                        "roles": list(_whole().graph_roles(name, config.carried.iterated)),
                    }
                    for name in graphs
                ],
                "quantization": {},
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
