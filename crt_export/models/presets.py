"""Randomly initialised checkpoints of the published sizes, so that anyone can repeat a measurement.

Sizes: M. Godavarti, "The Context-Ready Transformer", arXiv 2606.27538, table of models: vocabulary 32,000, 16 heads,
the head not tied. Speed and memory do not depend on what the weights are; quality does: these models write noise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from crt_export.checkpoint import tensor_shapes, write_checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.folders import temporary_folder

#: Bytes are the vocabulary's first 256 ids, so any text can be fed and no tokenizer file is needed.
_COMMON: dict[str, Any] = {
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_layout": "interleaved",
    "tie_word_embeddings": False,
    "tokenizer": "byte",
    "max_position_embeddings": 4096,
    "training_sequence_length": 1024,
}


def _published(layers: int, hidden: int, *, unroll: int = 0) -> ModelConfig:
    """A size of the paper's table; ``unroll`` 0 is a plain transformer."""
    sizes = {"vocab_size": 32_000, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 16}
    return _config(sizes, unroll)


def _config(sizes: Mapping[str, int], unroll: int) -> ModelConfig:
    inner = 4 * sizes["hidden_size"]
    kind: dict[str, Any] = {"model_type": "transformer"}
    if unroll:
        kind = {
            "model_type": "context_ready_transformer",
            "correction_intermediate_size": inner,
            "unroll_steps": unroll,
        }
    return ModelConfig.from_dict({**kind, **sizes, "intermediate_size": inner, **_COMMON})


#: By name: CRTs with the K they were trained for, the plain transformers the paper compares them with, and a small one.
PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "d5-1120": _published(5, 1120, unroll=5),
        "d1-2048": _published(1, 2048, unroll=10),
        "transformer-12x768": _published(12, 768),
        "transformer-6x1088": _published(6, 1088),
        "tiny": _config(
            {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}, unroll=4
        ),
    }
)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights by checkpoint name, float32, the same for the same seed: normal, scaled to keep activations near one.

    Linears have deviation 0.5 / sqrt(fan-in): a recurrence that neither dies out nor amplifies rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):  # of two dims where each head has its own
            return 1 + values * 0.1
        if len(shape) == 2:
            return values * (0.5 if name == "embed.weight" else 0.5 / shape[1] ** 0.5)
        return values * 0.1

    return {name: tensor(name, shape) for name, shape in tensor_shapes(config).items()}


def write_preset(name: str, output: Path, *, seed: int = 0) -> ModelConfig:
    """Write a checkpoint folder of a preset's size with random weights; complete or not at all.

    Args:
        name: One of :data:`PRESETS`.
        output: Folder to make; it may exist if it is empty.
        seed: Of the random weights, from 0 to 2**63 - 1.

    Raises:
        InputError: Unknown preset, a seed out of range, or an output that exists or cannot be written.
    """
    config = PRESETS.get(name)
    if config is None:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, found {name!r}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be from 0 to 2**63 - 1, found {seed}")
    output = Path(os.path.realpath(output))  # a link stays, and what it points at is filled
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output}: exists already; name a new folder, or remove this one yourself")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(output.parent, f".{output.name}.init") as staging:
            written = write_checkpoint(staging / "checkpoint", config, random_tensors(config, seed))
            written.replace(output)  # takes the place of an empty folder, of nothing else
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); name another folder") from error
    return config
