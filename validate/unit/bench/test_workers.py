"""A worker that dies, fails or is no longer needed leaves one clear error and no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crt_export.bench.worker import WorkerProcess
from crt_export.errors import BenchError, BundleError

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _runs(pid)


def test_errors_cross_the_pipe_and_a_killed_worker_is_named_with_its_signal(tmp_path: Path) -> None:
    with WorkerProcess("the demo") as worker:
        with pytest.raises(BundleError, match="no such bundle folder"):
            worker.ask("open", kind="target", path=str(tmp_path / "none"), target="x", batch=1, threads=1)
        with pytest.raises(BenchError, match="the demo failed: RuntimeError: the first request must open"):
            worker.ask("steps", position=0, warmups=0, count=1)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(BenchError, match=r"ran the demo died: signal SIGKILL; most likely it"):
            worker.ask("steps", position=0, warmups=0, count=1)
    assert not _runs(worker.pid)


def test_interrupting_the_command_ends_every_process_with_the_code_of_an_interruption() -> None:
    command = [sys.executable, "-m", "crt_export", "bench", str(GOLDEN), "--rounds", "100000", "--prompt-tokens", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stderr is not None
    while process.stderr.readline() not in ("steps in turns\n", ""):
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    listed = children.exists()  # not every kernel lists them
    workers = [int(pid) for pid in children.read_text().split()] if listed else []
    assert len(workers) == 2 * listed  # the probe and the target
    process.send_signal(signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # a benchmark that goes on would slow down everything after it
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert all(_ends(pid) for pid in workers)


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    script = (
        "from crt_export.bench.worker import WorkerProcess\n"
        "import time\n"
        "worker = WorkerProcess('x')\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, encoding="utf-8")
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _runs(pid)
    parent.kill()
    parent.communicate()
    assert _ends(pid)
