"""The exported step graph in ONNX Runtime with every tensor bound on the device, so that CUDA can capture it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.engine.ort import import_onnxruntime
from crt_export.graph.export import export_graph
from crt_export.graph.weights import write_graph, write_weights
from crt_export.models.presets import random_tensors
from crt_export.models.registry import model_from_checkpoint

_DTYPES: dict[str, Any] = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(float)": np.float32}
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


def write_step(config: ModelConfig, folder: Path, *, dtype: torch.dtype, seed: int = 0) -> Path:
    """Export the step with the random weights of ``crt-export init`` into an empty folder; returns the graph's file."""
    tensors = random_tensors(config, seed)
    checkpoint = Checkpoint(path=folder, config=config, tensors=tensors, stored_dtypes=("F32",), sha256="")
    graph = export_graph(model_from_checkpoint(checkpoint, dtype), "step")
    path = folder / "step.onnx"
    write_graph(graph, path, write_weights({"step": graph}, folder / "step.weights"))
    return path


class BoundStep:
    """A batch of sequences at one position; caches are updated in place, token and state are fed again as they are.

    Args:
        path: The step graph.
        device: ``cuda`` or ``cpu``.
        batch: Sequences.
        context: Tokens that the caches have room for.
        captured: Let CUDA capture the first run into a graph and launch that from then on.

    Attributes:
        values: The bound tensors by name.

    Raises:
        MissingDependencyError: The installed ONNX Runtime cannot use the device.
    """

    def __init__(self, path: Path, *, device: str, batch: int, context: int, captured: bool) -> None:
        ort = import_onnxruntime(device)
        options = {"enable_cuda_graph": "1"} if captured else {}
        self._session: Any = ort.InferenceSession(str(path), providers=[(_PROVIDERS[device], options)])
        self._binding = self._session.io_binding()
        self._sizes: dict[Any, Any] = {"batch": batch, "capacity": context}
        self.batch, self.context, self.values = batch, context, {}
        for node in self._session.get_inputs():
            self.values[node.name] = value = self._zeros(ort, node, device)
            self._binding.bind_ortvalue_input(node.name, value)
        for node in self._session.get_outputs():
            past = node.name.replace("present_", "past_")
            value = self.values[past] if past in self.values else self._zeros(ort, node, device)
            self.values[node.name] = value
            self._binding.bind_ortvalue_output(node.name, value)

    def seek(self, position: int) -> None:
        """Go to a position; what the caches hold below it is attended as it is."""
        self.values["position"].update_inplace(np.full(self.batch, position, np.int64))

    def feed(self, tokens: list[int]) -> None:
        """Set the token that every row takes in the next step."""
        self.values["input_ids"].update_inplace(np.array(tokens, np.int64)[:, None])

    def take_state(self) -> None:
        """Continue from the state that the last step left; nothing to do for a plain transformer."""
        if "state" in self.values:
            self.values["state"].update_inplace(self.values["next_state"].numpy())

    def __call__(self) -> None:
        """Decode one token at the position, without moving on."""
        self._session.run_with_iobinding(self._binding)

    def _zeros(self, ort: Any, node: Any, device: str) -> Any:
        shape = [int(self._sizes.get(dim, dim)) for dim in node.shape]
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _DTYPES[node.type]), device, 0)
