"""The self-test: whether a bundle still computes what PyTorch computed, on the machine where it is deployed.

Vectors made by PyTorch FP32 lie in the bundle (:mod:`~crt_export.selftest.vectors`); every target that runs here
replays them through the public session API (:mod:`~crt_export.selftest.replay`). Needs numpy, safetensors and the
runtimes of the targets, never torch or onnx::

    report = run_selftest("build/demo")
    print(report.passed, report.failures)
"""

from __future__ import annotations

from crt_export.selftest.replay import run_selftest
from crt_export.selftest.results import ReplayResult, SelftestReport, TargetResult, TensorResult
from crt_export.selftest.vectors import VECTORS_FILE, Vectors, load_vectors

__all__ = [
    "VECTORS_FILE",
    "ReplayResult",
    "SelftestReport",
    "TargetResult",
    "TensorResult",
    "Vectors",
    "load_vectors",
    "run_selftest",
]
