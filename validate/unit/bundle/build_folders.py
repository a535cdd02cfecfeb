"""What builds leave in a folder, and processes of builds that a test ends."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from crt_export.bundle import open_bundle

DEAD_PID = 4194305  # one more than Linux ever gives


def names(folder: Path) -> list[str]:
    """Names of the entries of a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def content_of(bundle: Path) -> str:
    """What the file of a bundle says that tells builds apart, after every file was verified."""
    opened = open_bundle(bundle)
    opened.verify_all()
    return opened.file("report.md").read_text("utf-8")


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Wait for a line."""
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def kill(process: subprocess.Popen[str]) -> None:
    """End a process by SIGKILL."""
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
