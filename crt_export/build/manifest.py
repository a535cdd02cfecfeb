"""Stage: everything a bundle says about itself."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crt_export import __version__
from crt_export.build.graphs import GraphFile
from crt_export.build.options import BuildOptions
from crt_export.build.targets import BuiltTarget
from crt_export.bundle import TOOL_NAME
from crt_export.checkpoint import Checkpoint
from crt_export.environment import installed_versions
from crt_export.parity import ParityReport
from crt_export.quantize import PLAN_FILE
from crt_export.runtime.prefill import PrefillPlan
from crt_export.spec import graph_names, graph_spec

#: The report of the build, beside the manifest; integrity protects it like every file.
REPORT_FILE = "report.json"
_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt")


def manifest_from_build(
    checkpoint: Checkpoint,
    options: BuildOptions,
    *,
    text: dict[str, str] | None,
    calibration: dict[str, Any] | None,
    graphs: Iterable[GraphFile],
    targets: Sequence[BuiltTarget],
    prefills: Mapping[str, PrefillPlan],
    report: ParityReport | None,
) -> dict[str, Any]:
    """The manifest, but for schema version and files, which ``Staging.commit`` adds.

    ``contract`` is the contract with float32 caches and symbolic capacity; each target states its cache dtype.
    """
    config = checkpoint.config
    every = [*graphs, *(file for target in targets for file in target.files)]
    return {
        "tool": {"name": TOOL_NAME, "version": __version__},
        "libraries": {"python": platform.python_version(), **installed_versions(_LIBRARIES)},
        "validated": report is not None and report.passed,
        "config": config.to_dict(),
        "checkpoint": {"sha256": checkpoint.sha256, "dtypes": list(checkpoint.stored_dtypes)},
        "options": _resolved_options(options, text, calibration, targets),
        "contract": {name: graph_spec(name, config, "float32").to_dict() for name in graph_names(config)},
        "graphs": [_graph_entry(file) for file in every],
        "quantization": {"w8a8": PLAN_FILE} if any(target.profile.precision == "w8a8" for target in targets) else {},
        "targets": {
            target.profile.name: {**target.to_dict(config), "prefill": prefills[target.profile.name].to_dict()}
            for target in targets
        },
        "parity": None if report is None else {"passed": report.passed, "report": REPORT_FILE},
    }


def _resolved_options(
    options: BuildOptions,
    text: dict[str, str] | None,
    calibration: dict[str, Any] | None,
    targets: Sequence[BuiltTarget],
) -> dict[str, Any]:
    """What the options came to; capacity and unroll differ by target and stand there."""
    return {
        "targets": [target.profile.name for target in targets],
        "text": text,
        "validated": options.validated,
        "reference": options.reference,
        "validation_tokens": options.parity.validation_tokens if options.validated else None,
        "calibration": calibration,
    }


def _graph_entry(file: GraphFile) -> dict[str, Any]:
    return {
        "file": file.file,
        "graph": file.form.graph,
        "precision": file.form.precision,
        "unroll": file.form.unroll,
        "weights": file.weights,
        "quantized_matmuls": file.quantized_matmuls,
    }
