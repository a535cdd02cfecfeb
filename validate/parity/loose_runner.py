"""A runner of loose ONNX files, for graphs that a test made without a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from crt_export.config import ModelConfig
from crt_export.parity.runner import Runner, runner_of_files
from crt_export.profile import DimRange, load_profile
from crt_export.runtime.opening import Target
from crt_export.runtime.prefill import PrefillPlan

_HALF = ("fp16", "w8a8")


def loose_runner(
    graphs: Mapping[str, Path], config: ModelConfig, precision: str, *, unroll: int, capacity: int | None = None
) -> Runner:
    """Load graphs as those of a target of this precision are loaded.

    Args:
        graphs: File per graph name.
        config: The model.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        unroll: Passes K of the prefill graph.
        capacity: That of a compiled target, which the graphs are fixed to; None for one of ONNX Runtime.
    """
    name = {"fp32": "ort-cpu-fp32", "w8": "ort-cpu-int8"}.get(precision, "ort-cuda-fp16")
    if capacity is not None or precision == "w8a8":
        name = "rtx-sm80-int8" if precision == "w8a8" else "rtx-sm80-fp16"
    room = capacity or config.max_position_embeddings
    seq = DimRange(1, min(64, room), min(256, room))
    profile = dataclasses.replace(load_profile(name), capacity=room, seq=seq)
    target = Target(
        name="loose",
        profile=profile,
        graphs={graph: str(path) for graph, path in graphs.items()},
        capacity=profile.capacity,
        unroll=unroll,
        cache_dtype="float16" if precision in _HALF else "float32",
        prefill=PrefillPlan(),
    )
    return runner_of_files(target, config, lambda graph: graphs[graph], 1)
