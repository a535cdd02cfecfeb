"""Key of a stage: what its result depends on, as one hash.

Besides its own inputs every stage depends on this package's files and on the libraries that make graphs and engines:
whatever changes there, nothing that was made before is found again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

from crt_export import __version__, catalog
from crt_export.environment import installed_versions

_LIBRARIES = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "tensorrt-rtx", "tensorrt",
)  # fmt: skip


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 over the name of a stage, its inputs (JSON values), this package and its libraries."""
    document = {"stage": stage, "inputs": inputs, "code": code_identity()}
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


@functools.cache
def code_identity() -> str:
    """SHA-256 over every source file of the package, the contracts of the graphs, and versions of what it calls."""
    total = hashlib.sha256(f"{__version__} {platform.python_version()} {platform.machine()}\n".encode())
    total.update(json.dumps(installed_versions(_LIBRARIES), sort_keys=True).encode())
    for path in (*catalog.sources(), *catalog.definitions("graphs")):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
