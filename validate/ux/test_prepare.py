from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def prepare(root: Path, tool: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "validate" / "prepare.py"), tool, str(folder)],
        env={**os.environ, "CRT_EXPORT_BROWSER": "", **changes},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("tool", "packages"), [("browser", "chromium"), ("clang", "clang libclang-rt-dev")])
def test_without_tool_and_package_manager_the_reason_is_kept(
    root: Path, tmp_path: Path, tool: str, packages: str
) -> None:
    result = prepare(root, tool, tmp_path / "tool", PATH=str(tmp_path))
    note = (tmp_path / "tool" / "missing.txt").read_text(encoding="utf-8")
    assert (result.returncode, result.stderr) == (3, note)
    assert f"apt-get install {packages}" in note


def test_a_browser_that_is_there_is_enough_and_an_old_reason_is_removed(root: Path, tmp_path: Path) -> None:
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\n", encoding="utf-8")
    browser.chmod(0o755)
    (tmp_path / "missing.txt").write_text("old\n", encoding="utf-8")
    result = prepare(root, "browser", tmp_path, PATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "missing.txt").exists()
