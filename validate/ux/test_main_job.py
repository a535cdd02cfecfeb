"""From checkpoint to text on the command line: stdout, stderr, JSON and exit codes of every verb on bundles."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# What users' own gates parse: more keys may come, none may go.
ROW_KEYS = {
    "target", "runtime", "graph", "precision", "regime", "tokens", "steps", "nll", "reference_nll", "delta_nll",
    "delta_nll_ci", "perplexity", "reference_perplexity", "max_abs_logit_error", "mean_kl", "top1_agreement",
    "arithmetic", "status", "passed",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(
    python_in: Run, tiny_checkpoint: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A validated bundle of one target, and what building it wrote."""
    folder = tmp_path_factory.mktemp("job")
    arguments = ("--output", "bundle", "--target", "ort-cpu-fp32", "--text", str(heldout_text), "--capacity", "64")
    result = python_in(folder, "-m", "crt_export", "build", str(tiny_checkpoint), *arguments, "--json")
    return folder / "bundle", result


@pytest.fixture
def bundle(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The bundle alone."""
    path, result = built
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit_weights(bundle: Path, keep_hash: bool) -> None:
    """Zero the last 4 KiB of the weights; without ``keep_hash`` the manifest is made to fit again."""
    weights = bundle / "graphs" / "fp32.weights"
    content = bytearray(weights.read_bytes())
    content[-4096:] = bytes(4096)
    weights.write_bytes(content)
    if not keep_hash:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"]["graphs/fp32.weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_build_json_is_one_document_and_progress_goes_to_stderr(
    built: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    path, result = built
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert Path(document["path"]) == path.resolve()
    assert document["validated"] is True
    assert list(document["targets"]) == ["ort-cpu-fp32"]
    assert document["targets"]["ort-cpu-fp32"]["capacity"] == 64
    assert "built in" in result.stderr
    assert "Traceback" not in result.stderr


def test_validate_json_has_the_promised_rows(crt_export: Run, bundle: Path, heldout_text: Path) -> None:
    result = crt_export("validate", str(bundle), "--text", str(heldout_text), "--json")
    report: dict[str, Any] = json.loads(result.stdout)
    assert (result.returncode, report["passed"]) == (0, True)
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    step = next(row for row in report["rows"] if row["target"] == "ort-cpu-fp32" and row["regime"] == "step")
    assert (step["status"], step["passed"]) == ("run", True)
    assert step["tokens"] >= 4096


def test_validate_fails_with_exit_1_when_the_built_weights_differ(
    crt_export: Run, copy: Path, heldout_text: Path
) -> None:
    edit_weights(copy, keep_hash=False)
    result = crt_export("validate", str(copy), "--text", str(heldout_text), "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["passed"]) == (1, False)
    assert any(row["passed"] is False for row in report["rows"])


def test_generate_streams_the_same_text_for_the_same_seed(crt_export: Run, bundle: Path) -> None:
    arguments = ("generate", str(bundle), "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "1")
    first, again, other = (crt_export(*arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout
    assert "8 tokens" in first.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "empty prompt"),
        (("--prompt", "a", "--max-new-tokens", "64"), "exceeds the capacity of 64"),
        (("--prompt", "a", "--target", "ort-cpu-fp16"), "ort-cpu-fp16"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    crt_export: Run, bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = crt_export("generate", str(bundle), *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_inspect_verifies_every_file(crt_export: Run, bundle: Path, copy: Path) -> None:
    document = json.loads(crt_export("inspect", str(bundle), "--verify", "--json").stdout)
    assert (document["kind"], document["verified"]) == ("bundle", True)
    assert document["contract"]["step"]["inputs"]
    edit_weights(copy, keep_hash=True)
    result = crt_export("inspect", str(copy), "--verify")
    assert result.returncode == 2
    assert "fp32.weights" in result.stderr


def test_inspect_shows_the_parity_summary(crt_export: Run, bundle: Path) -> None:
    result = crt_export("inspect", str(bundle))
    assert result.returncode == 0
    assert "validated" in result.stdout
    assert "agreement with PyTorch FP32" in result.stdout
    assert "\x1b" not in result.stdout


def test_build_for_an_unknown_target_writes_nothing(crt_export: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = crt_export("build", str(tiny_checkpoint), "--output", "out", "--target", "ort-cpu-fp23")
    assert (result.returncode, result.stdout) == (2, "")
    assert "did you mean ort-cpu-fp32?" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupted_build_leaves_nothing_behind(
    environment: dict[str, str], tiny_checkpoint: Path, heldout_text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "crt_export", "build", str(tiny_checkpoint), "--output", "out"]
    process = subprocess.Popen(
        [*command, "--target", "ort-cpu-fp32", "--text", str(heldout_text)],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            if line.startswith("export"):
                process.send_signal(signal.SIGINT)
                break
        rest = stream.read()
    assert process.wait(timeout=120) == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
