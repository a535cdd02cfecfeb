"""The tests keep to themselves: nothing of the user's is read or written, and they run in the background too."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from crt_export.engine.tensorrt.engine import cache_path
from crt_export.stages.store import default_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="home folders and signals of POSIX")


def test_home_caches_and_temporary_files_are_the_test_run_s_own(own_surroundings: Path, shared_folder: Path) -> None:
    import pwd

    cache = cache_path("x")
    assert Path.home().is_relative_to(own_surroundings)
    assert Path.home() != Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert default_folder() == shared_folder / "cache" / "crt-export" / "stages"
    assert cache is not None
    assert cache.is_relative_to(shared_folder)
    assert Path(tempfile.gettempdir()).is_relative_to(own_surroundings)


def test_a_process_of_a_test_finds_the_same(own_surroundings: Path) -> None:
    code = (
        "import pathlib, tempfile; from crt_export.stages.store import default_folder;"
        "print(pathlib.Path.home(), default_folder(), tempfile.gettempdir(), sep='\\n')"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert output.splitlines() == [str(Path.home()), str(default_folder()), tempfile.gettempdir()]
    assert str(own_surroundings) in output


def test_tests_of_signals_pass_in_a_background_job() -> None:
    """nohup and a shell's ``&`` start a process that ignores SIGINT and SIGHUP, as do all processes that it starts."""
    file = Path(__file__).with_name("test_termination.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(file), "-k", "library_call or command_line"]
    background = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        background, capture_output=True, text=True, check=False, cwd=file.parents[2], env=environment
    )
    assert result.returncode == 0, result.stdout
    assert "5 passed" in result.stdout
