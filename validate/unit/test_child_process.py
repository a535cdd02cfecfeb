"""A child ends with its parent, whatever ends the parent and whatever the child is doing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crt_export import child_process
from crt_export.child_process import ChildModule

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors and signals of POSIX")

PARENT = """
import sys
from crt_export.child_process import ChildModule
with ChildModule(sys.argv[1], "") as child:
    child.wait()
"""
#: A child that sleeps; one that never gives a thread of Python its turn and ignores what can be ignored.
CHILDREN = {
    "sleeper": "import time\nsay()\ntime.sleep(60)\n",
    "busy": (
        "import ctypes, signal\n"
        "for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGIO): signal.signal(number, signal.SIG_IGN)\n"
        "say()\nctypes.PyDLL(None).sleep(60)\n"  # a native call that holds the interpreter's lock
    ),
}
SAY = "import os, pathlib\ndef say(): pathlib.Path(os.environ['MARK']).write_text(str(os.getpid()))\n"


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended counts as gone before its new parent asks for its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
    except OSError:
        os.kill(pid, 0)
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc says which processes run")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", CHILDREN)
def test_a_child_ends_with_its_parent(kind: str, number: signal.Signals, tmp_path: Path) -> None:
    if kind == "busy" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux ends a process that is in the middle of native code")
    (tmp_path / f"{kind}.py").write_text(SAY + CHILDREN[kind])
    mark = tmp_path / "pid"
    environment = {**os.environ, "MARK": str(mark), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, kind], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        child = int(mark.read_text())
        assert _runs(child)
    finally:
        parent.send_signal(number)
        parent.wait()
    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def test_a_parent_that_died_before_the_child_was_tied_to_it_ends_it_at_once() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    command = [sys.executable, "-P", *["-m", child_process.__name__, str(reading), "http.server"]]
    assert subprocess.run(command, pass_fds=[reading], timeout=60, check=False, capture_output=True).returncode != 0
    os.close(reading)


def test_a_child_runs_as_a_module_does_and_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo.py").write_text(
        "import sys\nif __name__ == '__main__': print(sys.argv[1:], __spec__.name, sys.stdin.read())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    with ChildModule("echo", "job") as child:
        end = child.wait()
    assert (end.code, end.answer, end.printed) == (0, b"[] echo job\n", "")
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_nothing_else_of_the_package_starts_processes() -> None:
    package = Path(str(child_process.__file__)).parent
    starts = re.compile(
        r"subprocess\.(Popen|run|call|check_\w+)\(|os\.(fork|spawn|posix_spawn|exec|system)|multiprocessing"
    )
    found = {path.name for path in package.rglob("*.py") if starts.search(path.read_text(encoding="utf-8"))}
    assert found == {"child_process.py"}
