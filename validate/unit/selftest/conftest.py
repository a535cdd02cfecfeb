"""A tiny bundle with vectors, and copies of it that a test may damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle.manifest import sealed
from crt_export.runtime.tensor_file import read_tensor_file, tensor_file_bytes
from crt_export.selftest.vectors import VECTORS, VECTORS_FILE

Edit = Callable[[dict[str, str], dict[str, np.ndarray]], object]


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Callable[..., tuple[Path, Any]]) -> Path:
    """A recurrent model of one layer, with vectors. Read it, never write into it."""
    return tiny_bundle("crt", num_hidden_layers=1, unroll_steps=3)[0]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.fixture
def edit_vectors(copy: Path, sign_again: Callable[[Path], None]) -> Callable[[Edit], Path]:
    """``edit_vectors(edit) -> bundle``: change metadata and tensors in place, with checksums that fit."""

    def change(edit: Edit) -> Path:
        file = copy / VECTORS_FILE
        metadata, tensors = read_tensor_file(VECTORS, file)
        edit(metadata, tensors)
        file.write_bytes(tensor_file_bytes(VECTORS, metadata, tensors))
        sign_again(copy)
        return copy

    return change


@pytest.fixture
def edit_manifest(copy: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    def change(edit: Callable[[dict[str, Any]], object]) -> Path:
        path = copy / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        edit(manifest)
        path.write_text(json.dumps(sealed(manifest)), encoding="utf-8")
        return copy

    return change
