"""What a cheap operation loads. Modules are counted, not seconds: a busy machine must not fail this."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

HEAVY = {
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx",
    "safetensors", "tokenizers",
}  # fmt: skip


def loaded(python: Run, statement: str) -> set[str]:
    """Top-level modules that are loaded after ``statement``."""
    result = python("-c", f"import json, sys\n{statement}\njson.dump(sorted(sys.modules), sys.stderr)")
    assert result.returncode == 0, result.stderr
    return {name.split(".")[0] for name in json.loads(result.stderr)}


@pytest.mark.parametrize(
    "module",
    [
        "crt_export",
        "crt_export.runtime",
        "crt_export.bundle",
        "crt_export.config",
        "crt_export.profile",
        "crt_export.cli",
        "crt_export.environment",
    ],
)
def test_import_loads_no_framework_and_no_runtime(python: Run, module: str) -> None:
    assert not loaded(python, f"import {module}") & HEAVY


def test_embedding_loads_no_terminal_library(python: Run) -> None:
    assert not loaded(python, "import crt_export.runtime") & {"click", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["build", "--help"], ["generate", "--help"]])
def test_help_loads_nothing_but_click(python: Run, arguments: list[str]) -> None:
    modules = loaded(python, f"from crt_export.cli import main\nassert main({arguments!r}) == 0")
    assert not modules & (HEAVY | {"numpy", "rich"})


def test_targets_and_doctor_load_no_framework(python: Run) -> None:
    statement = "from crt_export.cli import main\nassert main(['targets']) == 0\nmain(['doctor'])"
    assert not loaded(python, statement) & HEAVY


def test_reading_and_comparing_reports_loads_no_framework_and_no_plots(python: Run) -> None:
    """A report is compared where only the core is installed."""
    modules = "crt_export.report.compare, crt_export.report.reading, crt_export.report.output"
    assert not loaded(python, f"import {modules}") & (HEAVY | {"matplotlib", "jinja2"})
