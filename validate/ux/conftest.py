"""The command line as a user runs it: a process of its own, away from the checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

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


@pytest.fixture(scope="session")
def readme_commands() -> list[list[str]]:
    """The arguments of every crt-export command of the README and of docs/commands.md, as they stand there, once."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/commands.md")]
    lines = "\n".join(re.findall(r"^```console\n(.*?)^```", "\n".join(texts), re.M | re.S)).splitlines()
    every = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("$ crt-export ")]
    return [command for index, command in enumerate(every) if command not in every[:index]]


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the main job ran: one folder for every worker of a test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "main-job"


@pytest.fixture(scope="session")
def small_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """What stands in for the demo; a build of it finds the stages of the main job."""
    return make_checkpoint(hidden_size=64, num_hidden_layers=1, unroll_steps=2, max_position_embeddings=300)


@pytest.fixture(scope="session")
def main_job(
    python_in: Run,
    small_checkpoint: Path,
    heldout_text: Path,
    readme_commands: list[list[str]],
    job_folder: Path,
) -> subprocess.CompletedProcess[str]:
    """The README's build command, verbatim, where a smaller model stands in for the demo; all default targets."""
    answer = job_folder / "answer.json"
    with FileLock(job_folder.with_suffix(".lock")):
        if not answer.is_file():
            demo = job_folder / "examples" / "demo"
            demo.mkdir(parents=True)
            shutil.copytree(small_checkpoint, demo / "checkpoint")
            shutil.copyfile(heldout_text, demo / "heldout.txt")
            command = next(arguments for arguments in readme_commands if arguments[0] == "build")
            result = python_in(job_folder, "-m", "crt_export", *command, "--json")
            answer.write_text(json.dumps([result.returncode, result.stdout, result.stderr]), encoding="utf-8")
    return subprocess.CompletedProcess([], *json.loads(answer.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def bundle(main_job: subprocess.CompletedProcess[str], job_folder: Path) -> Path:
    """The bundle that the main job made. Read it, never write into it: every worker shares the folder."""
    assert main_job.returncode == 0, main_job.stderr
    return job_folder / "build" / "demo"
