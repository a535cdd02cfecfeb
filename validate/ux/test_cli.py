from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crt_export import __version__
from crt_export.checkpoint import load_checkpoint

Run = Callable[..., "subprocess.CompletedProcess[str]"]
VERBS = ("build", "validate", "report", "compare", "generate", "inspect", "targets", "doctor")


def test_version(crt_export: Run) -> None:
    result = crt_export("--version")
    assert (result.returncode, result.stdout) == (0, f"crt-export, version {__version__}\n")


def test_help_names_every_verb_and_exit_code(crt_export: Run) -> None:
    result = crt_export("--help")
    assert result.returncode == 0
    words = result.stdout.split()
    assert all(verb in words for verb in VERBS)
    assert all(code in result.stdout for code in ("0 success", "1 parity", "2 bad input", "3 env", "70", "130"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage"),
        (("frobnicate",), "No such command"),
        (("build",), "Missing argument"),
        (("build", "x"), "Missing option '--output'"),
        (("build", "x", "--output", "y", "--capacity", "many"), "not a valid integer"),
        (("build", "x", "--output", "y", "--text", "a", "--tokens", "b"), "exclude each other"),
        (("validate", "x", "--text", "a", "--tokens", "b"), "exclude each other"),
        (("generate", "x"), "Missing option '--prompt'"),
        (("generate", "x", "--prompt", "a", "--temperature", "-1"), "temperature must be"),
        (("generate", "x", "--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        (("generate", "x", "--prompt", "a", "--stop", "", "--passes", "0"), "2 problems"),
        (("generate", "absent", "--prompt", "a"), "no such bundle folder"),
        (("inspect", "absent"), "no such bundle folder"),
        (("report", "absent", "--output", "x.html"), "absent cannot be read"),
        (("report", "absent"), "Missing option '--output'"),
        (("compare", "absent", "absent"), "absent cannot be read"),
    ],
)
def test_wrong_use_is_exit_2_with_the_reason_on_stderr(
    crt_export: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = crt_export(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_targets_json_is_one_document(crt_export: Run) -> None:
    result = crt_export("targets", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    targets = {entry["profile"]["name"]: entry for entry in json.loads(result.stdout)["targets"]}
    assert targets["ort-cpu-fp32"]["status"] == "run"
    assert targets["rtx-sm80-fp16"]["profile"]["compute_capability"] == 80


def test_targets_says_what_is_possible_here(crt_export: Run) -> None:
    lines = crt_export("targets").stdout.splitlines()
    line = next(line for line in lines if line.startswith("ort-cpu-fp32 "))
    assert "builds and runs here" in line


def test_doctor_json_names_every_package_with_its_extra(crt_export: Run) -> None:
    result = crt_export("doctor", "--json")
    findings = json.loads(result.stdout)
    assert result.returncode == (3 if findings["problems"] else 0)
    packages = {package["name"]: package for package in findings["packages"]}
    assert packages["torch"]["version"]
    assert packages["onnxruntime-gpu"]["extra"] == "cuda"
    assert all(package["needed_for"] for package in packages.values())
    assert findings["python"] == ".".join(map(str, sys.version_info[:3]))


def test_doctor_reports_both_onnxruntime_wheels(python: Run, tmp_path: Path) -> None:
    """A second wheel's metadata on the path is what a double installation looks like."""
    metadata = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    found = f"import sys; sys.path.append({str(metadata.parent)!r})"
    result = python("-c", f"{found}; from crt_export.cli import main; sys.exit(main())", "doctor")
    assert result.returncode == 3
    assert "both installed" in result.stderr


def test_inspect_checkpoint_as_text_and_json(crt_export: Run, tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    text = crt_export("inspect", str(tiny_checkpoint))
    assert text.returncode == 0, text.stderr
    count = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    assert f"{count:,} parameters" in text.stdout
    document = json.loads(crt_export("inspect", str(tiny_checkpoint), "--json").stdout)
    assert document["kind"] == "checkpoint"
    assert (document["parameters"], document["sha256"]) == (count, checkpoint.sha256)
    assert document["config"] == checkpoint.config.to_dict()
    assert document["dtypes"] == ["F32"]
    assert (document["capacity"], document["state_bytes"]) == (64, 32 * 4)  # no more than the model has positions
    assert document["cache_bytes_float32"] == 2 * document["cache_bytes_float16"] == 64 * 2 * 2 * 32 * 4
    assert "a row holds 128 bytes of state, and 32.0 KiB of caches of 64 tokens in float32" in text.stdout


def test_inspect_damaged_checkpoint_is_exit_2(crt_export: Run, make_checkpoint: Callable[..., Path]) -> None:
    weights = make_checkpoint() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = crt_export("inspect", str(weights.parent), "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert "model.safetensors" in result.stderr


def test_closed_stdout_is_not_an_error_message(python: Run) -> None:
    """``crt-export targets | head -0``: the reader is gone before the first line."""
    statement = (
        "import os, sys\nfrom crt_export.cli import main\nreading, writing = os.pipe()\nos.close(reading)\n"
        "os.dup2(writing, 1)\nsys.exit(main(['targets']))"
    )
    result = python("-c", statement)
    assert (result.returncode, result.stderr) == (141, "")
