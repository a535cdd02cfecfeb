"""Builds that die: whenever that happens, the old bundle or the new one is there, entire, and the rest is swept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.bundle import exchange, leftovers, open_bundle, ownership, stage_bundle
from crt_export.bundle import staging as staging_module
from crt_export.errors import BundleError

Build = Callable[..., Path]
Start = Callable[..., subprocess.Popen[str]]
DEAD_PID = 4194305  # one more than Linux ever gives


@pytest.fixture
def two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two folders."""
    monkeypatch.setattr(exchange, "exchange_folders", lambda first, second: False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content_of(bundle: Path) -> str:
    opened = open_bundle(bundle)
    opened.verify_all()
    return opened.file("report.md").read_text("utf-8")


# ---------------------------------------------------------------- SIGKILL while staging

WAIT = """
with stage_bundle(output) as staging:
    (staging.path / "half").write_text("half")
    print("staging", flush=True)
    time.sleep(60)
"""


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


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


# ---------------------------------------------------------------- leftovers of whom?


def make_partial(folder: Path, pid: int) -> Path:
    partial = folder / f".demo.partial-{pid}"
    (partial / "graphs").mkdir(parents=True)
    return partial


PATIENT = """
with stage_bundle(output) as staging:
    print("staging", flush=True)
    sys.stdin.readline()
    write(staging.path, "slow")
    staging.commit(manifest)
"""


def test_a_running_build_is_left_alone_and_both_can_finish(tmp_path: Path, build: Build, start: Start) -> None:
    process = start(PATIENT)
    wait_for(process, "staging")
    build(tmp_path / "demo", content="fast")
    assert names(tmp_path) == [f".demo.partial-{process.pid}", "demo"]
    assert content_of(tmp_path / "demo") == "fast"
    _, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, errors
    assert names(tmp_path) == ["demo"]
    assert open_bundle(tmp_path / "demo").file("report.md").read_text("utf-8") == "slow"


def test_partial_of_a_dead_pid_is_swept(tmp_path: Path, build: Build) -> None:
    make_partial(tmp_path, DEAD_PID)
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo"]


def test_partial_of_a_live_process_is_kept_even_without_a_lock(tmp_path: Path, build: Build) -> None:
    partial = make_partial(tmp_path, os.getppid())
    build(tmp_path / "demo")
    assert names(tmp_path) == [partial.name, "demo"]


def test_a_pid_that_is_used_again_does_not_protect_an_old_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        partial = make_partial(tmp_path, process.pid)
        found = leftovers.parse_leftover(partial)
        assert found is not None
        assert not leftovers.is_abandoned(found)
        # ctime cannot be set; a process that started an hour later is the same thing seen from the other side
        monkeypatch.setattr(leftovers, "start_time", lambda pid: time.time() + 3600)
        assert leftovers.is_abandoned(found)
    finally:
        process.kill()
        process.wait()


def test_start_time_of_a_process() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        started = ownership.start_time(process.pid)
        if started is None:
            pytest.skip("this system has no /proc")
        assert abs(started - time.time()) < 5
    finally:
        process.kill()
        process.wait()
    assert ownership.start_time(process.pid) is None


def test_partial_with_our_own_pid_is_swept_if_no_build_of_ours_holds_it(tmp_path: Path, build: Build) -> None:
    make_partial(tmp_path, os.getpid())  # in a container every build may have the same PID
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo"]


def test_second_build_of_one_output_in_one_process_is_refused(tmp_path: Path, build: Build) -> None:
    with stage_bundle(tmp_path / "demo") as staging:
        with pytest.raises(BundleError, match="another build of demo is running in this process"):
            build(tmp_path / "demo")
        assert staging.path.is_dir()


def test_leftovers_of_other_outputs_and_lookalikes_are_kept(tmp_path: Path, build: Build) -> None:
    kept = [
        ".other.partial-4194305",
        ".demo.partial-x",
        "demo.partial-4194305",
        ".demo.partial-",
        ".demo.x.partial-4194305",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / f".demo.partial-{DEAD_PID}").write_text("a file", "utf-8")
    (tmp_path / "precious").mkdir()
    (tmp_path / f".demo.partial-{DEAD_PID + 1}").symlink_to(tmp_path / "precious")
    before = names(tmp_path)
    build(tmp_path / "demo")
    assert names(tmp_path) == sorted([*before, "demo"])


def test_links_inside_a_stale_partial_are_not_followed(tmp_path: Path, build: Build) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"")
    (make_partial(tmp_path, DEAD_PID) / "graphs" / "link").symlink_to(tmp_path / "precious")
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo", "precious"]
    assert names(tmp_path / "precious") == ["file"]


def test_many_builds_of_one_output_at_once(tmp_path: Path, start: Start) -> None:
    script = 'for number in range(10):\n    build(f"{os.getpid()}-{number}")\n'
    two = "exchange.exchange_folders = lambda first, second: False\n"
    processes = [start(script), start(two + script), start(two + script)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert names(tmp_path) == ["demo"]
    opened = open_bundle(tmp_path / "demo")
    assert opened.file("report.md").read_text("utf-8") in {f"{process.pid}-9" for process in processes}


def test_a_reader_always_finds_a_bundle_while_builds_replace_it(tmp_path: Path, build: Build, start: Start) -> None:
    output = build(tmp_path / "demo")
    process = start(
        "exchange.exchange_folders = lambda first, second: False\nfor number in range(40):\n    build(str(number))\n"
    )
    opened = 0
    while process.poll() is None:
        open_bundle(output)
        opened += 1
    assert process.returncode == 0
    assert opened > 40


def test_without_folder_locks_the_pid_decides(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(folder: Path) -> int:
        raise OSError(95, "Operation not supported", str(folder))

    for module in (leftovers, ownership, staging_module):
        monkeypatch.setattr(module, "lock_folder", no_locks)
    make_partial(tmp_path, DEAD_PID)
    alive = make_partial(tmp_path, os.getppid())
    build(tmp_path / "demo")
    assert names(tmp_path) == [alive.name, "demo"]
    with stage_bundle(tmp_path / "demo"), pytest.raises(BundleError, match="another build of demo"):
        build(tmp_path / "demo")


def test_a_lock_that_is_never_released_ends_in_a_clear_error(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_LOCK_SECONDS", 0.1)
    with (
        ownership.folder_lock(tmp_path),
        pytest.raises(BundleError, match=r"has locked .* wait for it or end it"),
    ):
        build(tmp_path / "demo")
    build(tmp_path / "demo")
    assert names(tmp_path) == ["demo"]


def test_an_old_bundle_that_cannot_be_removed_is_a_warning_not_a_failure(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "demo", content="old")

    def failing(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(leftovers, "remove_folder", failing)
    with pytest.warns(RuntimeWarning, match=r"could not remove .*by hand"):
        build(tmp_path / "demo", content="new")
    monkeypatch.undo()
    assert content_of(tmp_path / "demo") == "new"
    build(tmp_path / "demo", content="newest")
    assert names(tmp_path) == ["demo"]
