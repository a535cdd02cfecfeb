"""How many kernels one decode step launches: what a backend spends on a step beside moving bytes."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crt_export.bench.static_model import model_from_tensors
from crt_export.bundle import open_bundle
from crt_export.config import ModelConfig
from crt_export.engine.ort import import_onnxruntime
from crt_export.models.presets import random_tensors

_DTYPES: dict[str, Any] = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(float)": np.float32}
_SMALL = {
    "vocab_size": 64,
    "tokenizer": "none",
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "training_sequence_length": 16,
}


class _Counting(TorchDispatchMode):
    """Counts the operators that compute or copy; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def operators_of_pytorch(config: ModelConfig) -> int:
    """Operators of one eager step; they do not depend on the sizes, so a narrow model of as many layers tells."""
    changes: dict[str, Any] = {**_SMALL, "hidden_size": 2 * config.carried.caches[0].query_heads, "head_dim": 2}
    if config.carried.iterated:
        changes["correction_intermediate_size"] = 16
    narrow = dataclasses.replace(config, **changes)
    model = model_from_tensors(narrow, random_tensors(narrow, 0))
    caches, state, ids = model.caches(1, 16), model.start(1), torch.zeros(1, 1, dtype=torch.int64)
    with _Counting() as counting:
        model.step(ids, state, caches, 4)
    return counting.count


def kernels_of_onnxruntime(bundle: Path, target: str) -> int:
    """Kernels of one step as ONNX Runtime ran it after its own optimisation, from its profile."""
    ort = import_onnxruntime("cpu")
    files = open_bundle(bundle, allow_unvalidated=True)
    path = files.file(files.manifest["targets"][target]["graphs"]["step"])
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.log_severity_level = 3  # caches that are not bound in place are warned of
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.add_session_config_entry("session.disable_prepacking", "1")  # of no influence on what is launched
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        sizes: dict[Any, Any] = {"batch": 1, "capacity": 8}
        feeds = {
            node.name: np.zeros([int(sizes.get(dim, dim)) for dim in node.shape], _DTYPES[node.type])
            for node in session.get_inputs()
        }
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return sum(event.get("cat") == "Node" and event["name"].endswith("_kernel_time") for event in events)
