"""Closed, full and slow outputs: all bytes get out or the exit code says so. Control characters never do."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crt_export.cli import console, main
from crt_export.cli.streams import Output, checked_streams
from crt_export.visible import visible, visible_json, visible_line

CLI = f"{sys.executable} -m crt_export"
Shell = Callable[[str], "subprocess.CompletedProcess[bytes]"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="file descriptors as POSIX has them")


@pytest.fixture
def golden(root: Path) -> Path:
    return root / "validate" / "golden" / "bundle-v1"


@pytest.fixture
def shell(tmp_path: Path, environment: dict[str, str]) -> Shell:
    """``shell(command)``: run it by sh."""
    return lambda command: subprocess.run(
        ["/bin/sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    ["targets", "targets --json", "--help", "--version", "inspect {golden}", "generate {golden} --prompt a"],
)
@pytest.mark.parametrize(("redirection", "reason"), [(">&-", "it is closed"), (">/dev/full", "No space left")])
def test_results_that_are_lost_are_exit_3(
    shell: Shell, golden: Path, arguments: str, redirection: str, reason: str
) -> None:
    result = shell(f"{CLI} {arguments.format(golden=golden)} {redirection}")
    assert result.returncode == 3, result.stderr
    assert f"error: stdout cannot be written to: {reason}".encode() in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device on this system")
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_report_on_a_lost_stdout_is_exit_3(shell: Shell, golden: Path, redirection: str) -> None:
    """Its name leads to the stream; a closed one must not be some other file by then."""
    result = shell(f"{CLI} report {golden} --output /dev/stdout {redirection}")
    assert result.returncode == 3, result.stderr
    assert b"error: /dev/stdout cannot be written: No space left" in result.stderr


def test_a_report_that_nobody_reads_is_141(shell: Shell, golden: Path) -> None:
    command = f"{{ {CLI} report {golden} --output /dev/stdout; echo $? >code; }} | true; cat code"
    assert shell(command).stdout == b"141\n"


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_lost_messages_are_exit_3_unless_there_is_a_worse_code(shell: Shell, golden: Path, redirection: str) -> None:
    result = shell(f"{CLI} generate {golden} --prompt a --max-new-tokens 3 {redirection}")
    assert result.returncode == 3
    assert len(result.stdout) >= 4  # the work itself was done
    assert shell(f"{CLI} inspect absent {redirection}").returncode == 2
    assert shell(f"{CLI} targets {redirection}").returncode == 0  # it has no message


def test_everything_closed_is_no_success(shell: Shell, golden: Path) -> None:
    assert shell(f"{CLI} inspect {golden} <&- >&- 2>&-").returncode == 3


def test_nobody_reading_is_141(shell: Shell, golden: Path) -> None:
    assert shell(f"{{ {CLI} inspect {golden} --json; echo $? >code; }} | true; cat code").stdout == b"141\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_slow_reader_of_a_nonblocking_pipe_gets_every_byte(
    golden: Path, environment: dict[str, str], stream: str
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = (
        "import sys; from crt_export.cli.streams import checked_streams\n"
        f"with checked_streams(): sys.{stream}.write('x' * 300000); sys.{stream}.write('end')"
    )
    unbuffered = {**environment, "PYTHONUNBUFFERED": "1" if stream == "stdout" else ""}  # other layers
    out, err = (writing, None) if stream == "stdout" else (None, writing)
    process = subprocess.Popen([sys.executable, "-c", code], env=unbuffered, stdout=out, stderr=err)
    os.close(writing)
    time.sleep(0.3)  # the pipe is full meanwhile
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    assert process.wait(60) == 0
    assert content == b"x" * 300000 + b"end"


def test_json_through_a_nonblocking_pipe_is_whole(golden: Path, environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen([*CLI.split(), "inspect", golden, "--json"], env=environment, stdout=writing)
    os.close(writing)
    time.sleep(1)
    with os.fdopen(reading, "rb") as pipe:
        document = json.loads(pipe.read())
    assert (process.wait(60), document["kind"]) == (0, "bundle")


def evil_bundle(golden: Path, folder: Path, sign_again: Callable[[Path], None]) -> Path:
    bundle = Path(shutil.copytree(golden, folder / "bundle"))
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    evil = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\r"
    manifest["tool"]["version"] = evil
    manifest["targets"]["ort-cpu-fp32"]["profile"]["title"] = f"two\nlines{evil}"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    sign_again(bundle)
    return bundle


def is_clean(text: str) -> bool:
    return not any(character in text for character in "\x1b\x07\x9b\u202e\r")


def test_tables_and_json_show_control_characters_as_escapes(
    golden: Path, tmp_path: Path, sign_again: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = evil_bundle(golden, tmp_path, sign_again)
    assert main(["inspect", str(bundle), "--full"]) == 0
    text = capsys.readouterr().out
    assert is_clean(text)
    assert r"\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\r" in text
    assert r"two\nlines" in text
    assert main(["inspect", str(bundle), "--json"]) == 0
    document = capsys.readouterr().out
    assert is_clean(document)
    assert json.loads(document)["tool"]["version"] == "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\r"


def test_errors_show_control_characters_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "a\x1b[2Jb")]) == 2
    assert main(["generate", "x", "--prompt", "x", "--frob\x1b[2J"]) == 2
    message = capsys.readouterr().err
    assert is_clean(message)
    assert message.count(r"\x1b[2J") == 2


def test_a_terminal_gets_only_what_rich_draws(
    golden: Path, tmp_path: Path, sign_again: Callable[[Path], None], environment: dict[str, str]
) -> None:
    bundle = evil_bundle(golden, tmp_path, sign_again)
    parent, child = pty.openpty()
    size = {**environment, "COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(
        [*CLI.split(), "inspect", bundle, "--full"], env=size, stdout=child, stderr=child, stdin=subprocess.DEVNULL
    )
    os.close(child)
    content = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        content += piece
        if not piece:
            break
    os.close(parent)
    assert process.wait(60) == 0
    text = content.decode()
    assert "pwned" in text
    assert "\x1b[32m" in text  # rich drew the verdict
    assert not any(part in text for part in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "written"), [(io.StringIO(), "a\x1b[2J\n\tb"), (Terminal(), "a\\x1b[2J\n\tb")], ids=["pipe", "terminal"]
)
def test_generated_text_is_raw_to_a_pipe_and_harmless_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, written: str
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    with checked_streams():
        console.write_generated("a\x1b[2J\n\tb")
    assert stream.getvalue() == written


def test_the_applications_own_stream_is_used_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["--version"]) == 0
    assert sys.stdout is stream
    assert stream.getvalue().startswith("crt-export, version")


def test_characters_that_the_encoding_lacks_are_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Output(stream, "stdout", strict=True).write("a\u00e9b")
    assert raw.getvalue() == b"a?b"


def test_escapes_are_those_of_python_and_of_json() -> None:
    assert visible("a\tb\nc\x00\x7f\x85\u2028") == "a\tb\nc\\x00\\x7f\\x85\\u2028"
    assert visible_line("a\tb\n") == "a\\tb\\n"
    assert visible("\u00e9\u4e2d\U0001f600") == "\u00e9\u4e2d\U0001f600"
    assert json.loads(visible_json(json.dumps("\x9b\u202e\x7f", ensure_ascii=False))) == "\x9b\u202e\x7f"
