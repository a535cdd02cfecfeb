"""What an earlier build left is swept if nobody owns it any more, and never otherwise."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from build_folders import DEAD_PID, content_of, names, wait_for

from crt_export import folders
from crt_export.bundle import open_bundle, recovery, stage_bundle
from crt_export.bundle import write as writing
from crt_export.errors import BundleError

Build = Callable[..., Path]
Start = Callable[..., subprocess.Popen[str]]


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
        found = recovery.parse_build_folder(partial)
        assert found is not None
        assert not folders.is_abandoned(found.path, found.pid)
        # ctime cannot be set; a process that started an hour later is the same thing seen from the other side
        monkeypatch.setattr(folders, "start_time", lambda pid: time.time() + 3600)
        assert folders.is_abandoned(found.path, found.pid)
    finally:
        process.kill()
        process.wait()


def test_start_time_of_a_process() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        started = folders.start_time(process.pid)
        if started is None:
            pytest.skip("this system has no /proc")
        assert abs(started - time.time()) < 5
    finally:
        process.kill()
        process.wait()
    assert folders.start_time(process.pid) is None


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

    for module in (folders, writing):
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
    monkeypatch.setattr(folders, "_LOCK_SECONDS", 0.1)
    with (
        folders.folder_lock(tmp_path),
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

    monkeypatch.setattr(recovery, "remove_folder", failing)
    with pytest.warns(RuntimeWarning, match=r"could not remove .*by hand"):
        build(tmp_path / "demo", content="new")
    monkeypatch.undo()
    assert content_of(tmp_path / "demo") == "new"
    build(tmp_path / "demo", content="newest")
    assert names(tmp_path) == ["demo"]
