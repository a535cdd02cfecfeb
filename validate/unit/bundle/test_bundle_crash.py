"""Builds that die: whenever that happens, the old bundle or the new one is there, entire, and the rest is swept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build_folders import DEAD_PID, content_of, kill, names, wait_for

from crt_export.bundle import exchange, open_bundle, stage_bundle
from crt_export.errors import BundleError

Build = Callable[..., Path]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two folders."""
    monkeypatch.setattr(exchange, "exchange_folders", lambda first, second: False)


# ---------------------------------------------------------------- SIGKILL while staging

WAIT = """
with stage_bundle(output) as staging:
    (staging.path / "half").write_text("half")
    print("staging", flush=True)
    time.sleep(60)
"""


def test_kill_while_staging(tmp_path: Path, build: Build, start: Start) -> None:
    output = build(tmp_path / "demo", content="old")
    process = start(WAIT)
    wait_for(process, "staging")
    partial = f".demo.partial-{process.pid}"
    assert names(tmp_path) == [partial, "demo"]
    kill(process)
    assert content_of(output) == "old"
    assert not (tmp_path / partial / "manifest.json").exists()
    with pytest.raises(BundleError, match="interrupted or running build"):
        open_bundle(tmp_path / partial)
    build(output, content="new")
    assert content_of(output) == "new"
    assert names(tmp_path) == ["demo"]


def test_kill_before_there_was_any_bundle(tmp_path: Path, build: Build, start: Start) -> None:
    process = start(WAIT)
    wait_for(process, "staging")
    kill(process)
    with pytest.raises(BundleError, match=f"unfinished build is beside it .*partial-{process.pid}"):
        open_bundle(tmp_path / "demo")
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo"]


def test_a_killed_build_whose_parent_has_not_noticed_counts_as_dead(tmp_path: Path, build: Build, start: Start) -> None:
    process = start(WAIT)
    wait_for(process, "staging")
    process.kill()
    # waits for the end and leaves the zombie in the process table, where kill(pid, 0) still finds it
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo"]
    process.communicate(timeout=30)


def test_ctrl_c_from_the_terminal_leaves_nothing(tmp_path: Path, build: Build, start: Start) -> None:
    output = build(tmp_path / "demo", content="old")
    process = start(WAIT)
    wait_for(process, "staging")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert names(tmp_path) == ["demo"]
    assert content_of(output) == "old"


# ---------------------------------------------------------------- SIGKILL at every single step

KILL_EVERYWHERE = """
import shutil
MODE = "{mode}"
if MODE == "two renames":
    exchange.exchange_folders = lambda first, second: False

# Every operation of a build that changes the disk, each of which the build may not survive.
remaining = [0]
def counted(owner, name):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        remaining[0] -= 1
        if remaining[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)
for name in ("fsync", "unlink", "rmdir", "mkdir", "rename"):
    counted(os, name)
counted(exchange, "exchange_folders")

def content():
    opened = open_bundle(output)
    for name in opened.names:
        opened.file(name)
    return opened.file("report.md").read_text()

seen = []
for step in range(1, 200):
    shutil.rmtree(folder); folder.mkdir()
    build("old")
    child = os.fork()
    if child == 0:
        remaining[0] = step
        build("new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    left = sorted(os.listdir(folder))
    found = content()
    build("newest")
    assert content() == "newest"
    assert os.listdir(folder) == ["demo"], (step, left, os.listdir(folder))
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0 and found == "new" and left == ["demo"]
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    seen.append([found, "demo" in left, any("previous" in name for name in left)])
else:
    raise AssertionError("the build never came to its end")
print(json.dumps(seen))
"""


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_kill_at_every_step_leaves_the_old_or_the_new_bundle(mode: str, run_script: Callable[..., str]) -> None:
    if mode == "exchange" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges two folders in one step")
    seen: list[list[Any]] = json.loads(run_script(KILL_EVERYWHERE.replace("{mode}", mode)))
    contents = [found for found, _, _ in seen]
    first_new = contents.index("new")
    assert set(contents[:first_new]) == {"old"}
    assert set(contents[first_new:]) == {"new"}
    assert first_new > 5
    outputs_missing = [step for step, (_, there, _) in enumerate(seen) if not there]
    if mode == "exchange":
        assert outputs_missing == []
        assert not any(previous for _, _, previous in seen)
    else:
        assert outputs_missing  # the instant between the two renames was hit, and was repaired
        assert any(previous for _, _, previous in seen)


# ---------------------------------------------------------------- the two ways to replace


def test_exchange_is_atomic_where_the_system_has_it(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
    if not exchange.exchange_folders(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two folders")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        exchange.exchange_folders(tmp_path / "a", tmp_path / "absent")


def test_two_renames(tmp_path: Path, build: Build, two_renames: None) -> None:
    build(tmp_path / "demo", content="old")
    build(tmp_path / "demo", content="new")
    assert content_of(tmp_path / "demo") == "new"
    assert names(tmp_path) == ["demo"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_failure_of_the_second_rename_is_undone_at_once(
    error: BaseException,
    tmp_path: Path,
    build: Build,
    two_renames: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(tmp_path / "demo", content="old")
    original = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise error
        return original(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        build(tmp_path / "demo", content="new")
    assert names(tmp_path) == ["demo"]
    assert content_of(tmp_path / "demo") == "old"


BETWEEN = """
exchange.exchange_folders = lambda first, second: False
original = Path.rename
def rename(self, target):
    if ".partial-" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)
Path.rename = rename
build("new")
"""


@pytest.mark.parametrize("repair", ["open", "build", "open over an empty folder", "failing build"])
def test_crash_between_the_two_renames_is_repaired(repair: str, tmp_path: Path, build: Build, start: Start) -> None:
    output = build(tmp_path / "demo", content="old")
    process = start(BETWEEN)
    process.communicate(timeout=60)
    assert names(tmp_path) == [f".demo.partial-{process.pid}", f".demo.previous-{process.pid}"]
    if repair == "build":
        build(output, content="newest")
        assert content_of(output) == "newest"
        assert names(tmp_path) == ["demo"]
        return
    if repair == "failing build":
        with pytest.raises(RuntimeError), stage_bundle(output):
            raise RuntimeError
    elif repair == "open over an empty folder":
        output.mkdir()
    assert content_of(output) == "old"
    build(output, content="newest")
    assert names(tmp_path) == ["demo"]


def test_a_half_removed_old_bundle_is_never_put_back(tmp_path: Path, build: Build) -> None:
    remains = tmp_path / f".demo.previous-{DEAD_PID}"
    (remains / "graphs").mkdir(parents=True)
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(tmp_path / "demo")
    build(tmp_path / "demo")
    assert content_of(tmp_path / "demo") == "first"
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo"]
