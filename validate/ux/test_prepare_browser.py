from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def prepare(root: Path, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "validate" / "ux" / "prepare_browser.py"), str(folder)],
        env={**os.environ, "CRT_EXPORT_BROWSER": "", **changes},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def test_without_browser_and_package_manager_the_reason_is_kept(root: Path, tmp_path: Path) -> None:
    result = prepare(root, tmp_path / "browser", PATH=str(tmp_path))
    note = (tmp_path / "browser" / "missing.txt").read_text(encoding="utf-8")
    assert (result.returncode, result.stderr) == (3, note)
    assert "apt-get install chromium" in note


def test_a_browser_that_is_there_is_enough_and_an_old_reason_is_removed(root: Path, tmp_path: Path) -> None:
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\n", encoding="utf-8")
    browser.chmod(0o755)
    (tmp_path / "missing.txt").write_text("old\n", encoding="utf-8")
    result = prepare(root, tmp_path, PATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "missing.txt").exists()
