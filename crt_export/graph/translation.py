"""Translation of the project's own PyTorch operators into nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript.onnx_opset import opset24


def translation_table() -> dict[Callable[..., object], Callable[..., object]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    operators = torch.ops.crt_export  # defined in crt_export.graph.scatter and crt_export.rotary
    return {
        operators.cache_update.default: _tensor_scatter,
        operators.rotary_embedding.default: _rotary_embedding,
    }


def _tensor_scatter(cache, update, position):
    return opset24.TensorScatter(cache, update, position, axis=-2, mode="linear")


def _rotary_embedding(x, cos, sin, interleaved: bool):
    return opset24.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved))
