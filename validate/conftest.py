"""Checkpoints and text that every test may use.

Fixtures that deliver functions are session-scoped, so that hypothesis tests can take them too. Importing a
module of the tests would tie them to a path; a fixture works against the installed package from any folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.checkpoint import tensor_shapes, write_checkpoint
from crt_export.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"

Tensors = dict[str, torch.Tensor]
TINY: dict[str, Any] = {
    "model_type": "context_ready_transformer",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "correction_intermediate_size": 48,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_layout": "interleaved",
    "unroll_steps": 4,
    "tie_word_embeddings": False,
    "tokenizer": "byte",
    "training_sequence_length": 32,
}


def _tiny_config(**changes: Any) -> ModelConfig:
    """A small CRT; ``model_type="transformer"`` also drops the correction."""
    values = {**TINY, **changes}
    if values["model_type"] == "transformer":
        values = {"unroll_steps": 1, **values, "correction_intermediate_size": None}
    if values["max_position_embeddings"] < (values["training_sequence_length"] or 0):
        values["training_sequence_length"] = values["max_position_embeddings"]
    return ModelConfig.from_dict(values)


def _random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Every weight of a checkpoint, float32, linears as [out, in]; no bias is zero and no gain is one.

    The scales keep activations near one, so that the map from one pass to the next contracts as if trained.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * deviation

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "embed.weight":
            return normal(shape, 0.5)
        if len(shape) == 2:
            return normal(shape, 0.5 / shape[1] ** 0.5)
        return 1 + normal(shape, 0.1) if name.endswith("norm.weight") else normal(shape, 0.1)

    return {name: weight(name, shape) for name, shape in tensor_shapes(config).items()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first, so that no worker is left with one at the end; needs --no-loadscope-reorder."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """``tiny_config(**changes) -> ModelConfig``: see ``TINY`` for the defaults."""
    return _tiny_config


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., Tensors]:
    """``random_tensors(config, seed=0)``: float32 tensors by checkpoint name, the same for the same seed."""
    return _random_tensors


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_checkpoint(seed=0, dtype=torch.float32, edit=None, **changes) -> Path``, always a new folder.

    ``edit`` is called with the dict of tensors before it is written and changes it in place.
    """

    def make(
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        edit: Callable[[Tensors], object] | None = None,
        **changes: Any,
    ) -> Path:
        config = _tiny_config(**changes)
        tensors = {name: tensor.to(dtype) for name, tensor in _random_tensors(config, seed).items()}
        if edit is not None:
            edit(tensors)
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", config, tensors)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny two-layer CRT. Read it, never write into it: all tests of a process share the folder."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_transformer_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The plain transformer of the same size. Read-only, like ``tiny_checkpoint``."""
    return make_checkpoint(model_type="transformer")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained checkpoint of the demo."""
    return DEMO / "checkpoint"


@pytest.fixture(scope="session")
def train_text() -> Path:
    """The text the demo was trained on."""
    return DEMO / "train.txt"


@pytest.fixture(scope="session")
def heldout_text() -> Path:
    """Real text the demo was not trained on."""
    return DEMO / "heldout.txt"
