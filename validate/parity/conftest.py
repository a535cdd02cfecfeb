"""One tiny bundle, really built, that the tests of this folder read and copy but never change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.pipeline import BuildOptions, build
from crt_export.text import TokenText


@pytest.fixture(scope="session")
def parity_checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """One layer, K = 2."""
    return load_checkpoint(make_checkpoint(num_hidden_layers=1, hidden_size=16, intermediate_size=32, unroll_steps=2))


@pytest.fixture(scope="session")
def parity_bundle(parity_checkpoint: Checkpoint, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated bundle for ort-cpu-fp32, all four graphs in ``graphs/NAME.fp32.onnx``."""
    output = tmp_path_factory.mktemp("bundle") / "tiny"
    build(
        BuildOptions(
            checkpoint=parity_checkpoint.path, output=output, targets=("ort-cpu-fp32",), text=heldout_text, capacity=64
        )
    )
    return output


@pytest.fixture(scope="session")
def real_text(heldout_text: Path) -> TokenText:
    """The demo's held-out text as bytes."""
    ids = np.frombuffer(heldout_text.read_bytes(), np.uint8).astype(np.int64)
    return TokenText(ids=ids, source="heldout.txt")
