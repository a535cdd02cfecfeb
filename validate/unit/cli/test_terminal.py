"""Terminals of 80 x 30 and 100 x 30: what ``inspect`` looks like there, through a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

ANSI = re.compile(r"\x1b\[([0-9;]*)m")
FOLDER, BUNDLE = Path(__file__).resolve().parents[2] / "golden", "bundle-v1"
COLOURS = {"32": "green", "31": "red", "33": "yellow"}


def shown(arguments: list[str], columns: int, environment: dict[str, str] | None = None) -> str:
    """What a command writes to a terminal of so many columns and 30 lines."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    unwanted = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    variables = {key: value for key, value in os.environ.items() if key not in unwanted}
    variables |= {"TERM": "xterm-256color", **(environment or {})}
    command = [sys.executable, "-m", "crt_export", *arguments]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=variables, cwd=FOLDER) as process:
        os.close(slave)
        parts = []
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux says so where the last writer has gone
                break
            if not part:
                break
            parts.append(part)
        assert process.wait(60) == 0
    os.close(master)
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 100])
def test_inspect_fits_its_terminal_with_the_verdict_first_and_last(columns: int) -> None:
    text = shown(["inspect", BUNDLE], columns)
    lines = ANSI.sub("", text).splitlines()
    assert len(lines) < 30, "all of it is on the screen at once"
    assert max(map(len, lines)) <= columns
    assert "validated" in " ".join(lines[:3])
    assert "parity: passed, not compared with your own model." in " ".join(lines[-2:])
    rows = [line.split()[0] for line in lines if re.match(r"ort-cpu-\w+ .*passed", line)]
    assert rows == ["ort-cpu-fp32", "ort-cpu-int8"]
    assert f"next: crt-export inspect {BUNDLE} --full" in lines


@pytest.mark.parametrize("columns", [80, 100])
def test_the_column_of_a_benchmark_fits_too(columns: int, make_bench: Callable[..., Path], tmp_path: Path) -> None:
    file = make_bench(tmp_path / "speed.json")
    lines = ANSI.sub("", shown(["inspect", BUNDLE, "--bench", str(file)], columns)).splitlines()
    assert len(lines) < 30
    assert max(len(line) for line in lines if str(file) not in line) <= columns
    assert [line.split()[-1] for line in lines if re.match(r"(target|ort-cpu-\w+) ", line)] == ["ms", "12.3", "0.312"]


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_the_full_tables_fold_no_word(columns: int) -> None:
    whole = ANSI.sub("", shown(["inspect", BUNDLE, "--full"], 1000)).split()
    narrow = ANSI.sub("", shown(["inspect", BUNDLE, "--full"], columns)).split()
    words = {word.strip(",:") for word in whole}
    titles = {"target", "graph", "regime", "tokens", "perplexity", "reference", "result"}
    assert {word.strip(",:") for word in narrow} <= words | titles
    assert words - titles <= {word.strip(",:") for word in narrow}


def test_colour_has_a_meaning_and_respects_no_color() -> None:
    text = shown(["inspect", BUNDLE], 80)
    coloured = {(COLOURS.get(code), word) for code, word in re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)\x1b\[0m", text)}
    assert coloured == {("green", "passed"), ("green", "validated")}
    assert "\x1b" not in shown(["inspect", BUNDLE], 80, {"NO_COLOR": "1"})
    assert "\x1b" not in shown(["inspect", BUNDLE], 80, {"TERM": "dumb"})
