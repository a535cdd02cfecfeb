"""SIGTERM and SIGHUP end a process as Ctrl-C does, unless the application handles them itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import pytest

from crt_export.cli.app import run_app
from crt_export.folders import sweep_abandoned, temporary_folder
from crt_export.termination import Terminated, not_interrupted, orderly_termination, termination_raises

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
DEAD_PID = 4194305  # one more than Linux ever gives

STAGING = """
import signal, sys, time
from crt_export.bundle import stage_bundle
{before}
with stage_bundle(sys.argv[1]) as staging:
    (staging.path / "half").write_bytes(b"half")
    print("staging", flush=True)
    time.sleep(60)
"""


def _ended(code: str, number: signal.Signals, *arguments: str) -> int:
    """Run code until it prints a line, send the signal, and wait for the end."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(number)
        return process.wait(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_library_call_leaves_nothing_and_the_process_ends_by_its_signal(
    number: signal.Signals, tmp_path: Path
) -> None:
    assert _ended(STAGING.format(before=""), number, str(tmp_path / "made" / "demo")) == -number
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_the_application_is_left_alone(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))"
    assert _ended(STAGING.format(before=before), signal.SIGTERM, str(tmp_path / "demo")) == 7
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    code = (
        "import os, signal\n"
        "from crt_export.termination import termination_raises\n"
        "with termination_raises():\n"
        "    os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(signal.getsignal(signal.SIGTERM).__name__)\n"
        "print(signal.getsignal(signal.SIGTERM).name)"
    )
    nohup = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", sys.executable, "-c", code]
    assert subprocess.run(nohup, capture_output=True, check=True, text=True).stdout == "_handler\nSIG_DFL\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_command_line_says_so_and_exits_with_the_code_of_the_signal(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []
    before = signal.signal(number, signal.SIG_DFL)

    @click.group()
    def app() -> None: ...

    @app.command()
    def wait() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            cleaned.append(True)

    try:
        assert run_app(app, ["wait"]) == code
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert cleaned == [True]
    assert capsys.readouterr() == ("", "terminated\n")


def test_cleaning_up_is_not_cut_off_by_a_second_signal() -> None:
    done = []

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            with not_interrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)
                done.append(True)

    with pytest.raises(Terminated) as ended, termination_raises():
        interrupted()
    assert ended.value.exit_code == 143
    assert done == [True]


def test_in_another_thread_nothing_is_changed() -> None:
    found = []

    def run() -> None:
        with orderly_termination():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


# ---------------------------------------------------------------- temporary folders

FOLDER = """
import time
from crt_export.folders import temporary_folder
with temporary_folder() as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this process and of its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_temporary_folder_goes_with_sigterm_and_what_sigkill_left_is_swept(temporary: Path) -> None:
    assert _ended(FOLDER, signal.SIGTERM) == -signal.SIGTERM
    assert list(temporary.iterdir()) == []
    assert _ended(FOLDER, signal.SIGKILL) == -signal.SIGKILL
    (left,) = temporary.iterdir()
    assert (left / "file").exists()
    with temporary_folder() as folder:
        assert list(temporary.iterdir()) == [folder]
    assert list(temporary.iterdir()) == []


def test_the_sweep_touches_nobody_else_s_folders(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / "kept").touch()
    (temporary / f"crt-export-{DEAD_PID}-link").symlink_to("elsewhere")
    (temporary / f"crt-export-{DEAD_PID}-file").touch()
    os.mkfifo(temporary / f"crt-export-{DEAD_PID}-pipe")
    (temporary / f"crt-export-{os.getppid()}-alive").mkdir()  # no lock, but its process lives
    (temporary / f"other-{DEAD_PID}-x").mkdir()
    before = sorted(temporary.rglob("*"))
    with temporary_folder() as live:
        sweep_abandoned()  # its lock is held
        assert sorted(temporary.rglob("*")) == sorted([*before, live])
    (temporary / f"crt-export-{DEAD_PID}-dead").mkdir()
    sweep_abandoned()
    assert sorted(temporary.rglob("*")) == before
