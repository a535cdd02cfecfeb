"""docs/how-to/add-a-target.md, followed for real in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("crt_export", "graphs", "engines", "validate", "docs", "examples", "pyproject.toml", "README.md")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "bundle-v1*")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy to edit."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=LEFT_OUT)
        else:
            shutil.copyfile(source, copy / name)
    for page in ROOT.glob("*.md"):
        shutil.copyfile(page, copy / page.name)
    return copy


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The copy's package in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("CRT_EXPORT_TEST_INSTALLED", None)
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", check=False)


def test_a_target_is_added_as_the_page_says(checkout: Path, small_checkpoint: Path) -> None:
    page = (checkout / "docs" / "how-to" / "add-a-target.md").read_text(encoding="utf-8")
    profile = re.search(r"```toml\n(.*?)```", page, re.S)
    named = re.search(r"\*\*`(engines/(\S+)\.toml)`\*\*", page)
    guard = re.search(r"python -m (pytest \S+ -k \S+)", page)
    assert profile is not None
    assert named is not None
    assert guard is not None
    file, target = named.groups()
    guard_words = ("-m", *guard[1].split(), "-q", "-p", "no:cacheprovider")
    assert run(checkout, *guard_words).returncode == 0
    (checkout / file).write_text(textwrap.dedent(profile[1]), encoding="utf-8")
    before = run(checkout, *guard_words)
    assert before.returncode == 1, before.stdout
    assert target in before.stdout
    matrix = checkout / "docs" / "install.md"
    text = matrix.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `ort-cpu-fp32`"))
    matrix.write_text(
        text.replace(row, f"{row}\n| `{target}` | written | written | written | written |"), encoding="utf-8"
    )
    after = run(checkout, *guard_words)
    assert after.returncode == 0, after.stdout
    listed = run(checkout, "-m", "crt_export", "targets")
    assert target in listed.stdout
    options = ("--output", "build/x", "--target", target, "--unvalidated")
    built = run(checkout, "-m", "crt_export", "build", str(small_checkpoint), *options)
    assert built.returncode == 0, built.stderr
    assert list((checkout / "build" / "x" / "graphs").glob("*.w8.onnx"))
