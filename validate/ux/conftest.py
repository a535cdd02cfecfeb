"""The command line as a user runs it: a process of its own, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def child_environment() -> dict[str, str]:
    """This process's environment; a developer's checkout is on the path only if it is on ours."""
    installed = os.environ.get("CRT_EXPORT_TEST_INSTALLED") == "1"
    path = os.environ.get("PYTHONPATH", "") if installed else str(ROOT)
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def python_in() -> Run:
    """``python_in(folder, *arguments)``: run the interpreter in a folder."""

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=child_environment(),
            capture_output=True,
            encoding="utf-8",
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment variables for a process that a test starts itself."""
    return child_environment()


@pytest.fixture
def python(python_in: Run, tmp_path: Path) -> Run:
    """``python(*arguments)``: run the interpreter in an empty folder."""
    return lambda *arguments: python_in(tmp_path, *arguments)


@pytest.fixture
def crt_export(python: Run) -> Run:
    """``crt_export(*arguments)``: run the command line in an empty folder."""
    return lambda *arguments: python("-m", "crt_export", *arguments)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout that the tests belong to."""
    return ROOT
