"""Stage: everything a bundle says about itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from crt_export import __version__
from crt_export.bundle import TOOL_NAME
from crt_export.bundle.schema import GRAPH_ROLES
from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.environment import installed_versions
from crt_export.parity import ParityReport
from crt_export.quantize.plan import PLAN_FILE
from crt_export.runtime.prefill import PrefillPlan
from crt_export.spec import graph_names, graph_spec
from crt_export.stages.options import BuildOptions
from crt_export.stages.targets import BuiltTarget

#: The report of the build, beside the manifest; integrity protects it like every file.
REPORT_FILE = "report.json"
_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt")


def manifest_from_build(
    checkpoint: Checkpoint,
    options: BuildOptions,
    *,
    text: dict[str, str] | None,
    calibration: dict[str, Any] | None,
    targets: Sequence[BuiltTarget],
    prefills: Mapping[str, PrefillPlan],
    report: ParityReport | None,
) -> dict[str, Any]:
    """The manifest, but for schema version and files, which ``Staging.commit`` adds.

    ``contract`` is the contract with float32 caches and symbolic capacity; each target states its cache dtype.
    """
    config = checkpoint.config
    return {
        "tool": {"name": TOOL_NAME, "version": __version__},
        "libraries": {"python": platform.python_version(), **installed_versions(_LIBRARIES)},
        "validated": report is not None and report.passed,
        "config": config.to_dict(),
        "model": config.info.to_dict(),
        "checkpoint": {
            "sha256": checkpoint.sha256,
            "dtypes": list(checkpoint.stored_dtypes),
            "parameters": config.parameter_count,
        },
        "options": _resolved_options(options, text, calibration, targets),
        "contract": {name: graph_spec(name, config, "float32").to_dict() for name in graph_names(config.carried)},
        "graphs": _graph_entries(targets, config),
        "quantization": {"w8a8": PLAN_FILE} if any(target.profile.precision == "w8a8" for target in targets) else {},
        "targets": {
            target.profile.name: {**target.to_dict(), "prefill": prefills[target.profile.name].to_dict()}
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


def _graph_entries(targets: Sequence[BuiltTarget], config: ModelConfig) -> list[dict[str, Any]]:
    """Every graph file once, with what all its targets open it for."""
    files = {file.file: file for target in targets for file in target.graphs.values()}
    roles: dict[str, set[str]] = {name: set() for name in files}
    for target in targets:
        for graph, file in target.graphs.items():
            roles[file.file].update(target.profile.graph_roles(graph, config.carried.iterated))
    return [
        {
            "file": name,
            "graph": file.variant.graph,
            "precision": file.variant.precision,
            "unroll": file.variant.unroll,
            "weights": file.weights,
            "quantized_matmuls": file.quantized_matmuls,
            "roles": [role for role in GRAPH_ROLES if role in roles[name]],
        }
        for name, file in sorted(files.items())
    ]
