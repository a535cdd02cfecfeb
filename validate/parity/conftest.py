"""One tiny bundle, really built, that the tests of this folder read and copy but never change."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock

from crt_export.bundle import MANIFEST_NAME
from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.pipeline import BuildOptions, build
from crt_export.text import TokenText

if TYPE_CHECKING:
    from fault_bundle import SpoiledBundle

if str(Path(__file__).parent) not in sys.path:  # for faults.py; pytest's import mode leaves the path alone
    sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def parity_checkpoint(make_checkpoint: Callable[..., Path], shared_traces: None) -> Checkpoint:
    """Two layers, K = 2."""
    return load_checkpoint(make_checkpoint(hidden_size=16, intermediate_size=32, unroll_steps=2))


@pytest.fixture(scope="session")
def parity_bundle(parity_checkpoint: Checkpoint, heldout_text: Path, shared_folder: Path) -> Path:
    """A validated bundle for ort-cpu-fp32, all four graphs in ``graphs/NAME.fp32.onnx``; the workers share it."""
    output = shared_folder / "parity-bundle"
    options = BuildOptions(
        checkpoint=parity_checkpoint.path, output=output, targets=("ort-cpu-fp32",), text=heldout_text, capacity=64
    )
    with FileLock(output.with_suffix(".lock")):
        if not (output / MANIFEST_NAME).is_file():
            build(options)
    return output


@pytest.fixture(scope="session")
def three_targets(parity_checkpoint: Checkpoint, shared_folder: Path) -> Path:
    """The same model for a target whose rows run together, one whose rows run apart, and one of a GPU."""
    output = shared_folder / "three-targets"
    targets = ("ort-cpu-fp32", "ort-cpu-int8", "ort-cuda-fp16")
    options = BuildOptions(
        checkpoint=parity_checkpoint.path, output=output, targets=targets, validated=False, capacity=64
    )
    with FileLock(output.with_suffix(".lock")):
        if not (output / MANIFEST_NAME).is_file():
            build(options)
    return output


@pytest.fixture
def spoiled(parity_bundle: Path, tmp_path: Path) -> SpoiledBundle:
    """A copy of the bundle, to be spoiled and signed again."""
    from fault_bundle import SpoiledBundle

    return SpoiledBundle(parity_bundle, tmp_path / "bundle", "ort-cpu-fp32")


@pytest.fixture
def graphs(parity_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle's FP32 graphs, to be damaged."""
    return Path(shutil.copytree(parity_bundle / "graphs", tmp_path / "graphs"))


@pytest.fixture(scope="session")
def real_text(heldout_text: Path) -> TokenText:
    """The demo's held-out text as bytes."""
    ids = np.frombuffer(heldout_text.read_bytes(), np.uint8).astype(np.int64)
    return TokenText(ids=ids, source="heldout.txt")
