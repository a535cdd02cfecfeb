"""Folders for the time of a block: gone after it, whoever is told to end how often."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crt_export.folders import sweep_abandoned, temporary_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

TOLD_TWICE = """
import os, shutil, signal, sys
from pathlib import Path
import crt_export.folders as module

remove = shutil.rmtree

def told_again(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    remove(*arguments, **options)

module.shutil.rmtree = told_again
with module.temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("x")
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_second_signal_does_not_stop_the_removal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOLD_TWICE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_threads_that_make_folders_leave_each_other_s_alone(tmp_path: Path) -> None:
    def work(turn: int) -> bool:
        with temporary_folder(tmp_path) as folder:
            (folder / "file").write_text(str(turn))
            sweep_abandoned(tmp_path)
            return (folder / "file").read_text() == str(turn)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert list(tmp_path.iterdir()) == []
