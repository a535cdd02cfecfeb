"""What runs side by side reports from one thread, fails with one error, and leaves no thread and no process behind."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from crt_export.child_process import ChildGroup, ChildModule
from crt_export.errors import BuildError
from crt_export.progress import Progress, no_progress
from crt_export.stages import targets
from crt_export.stages.targets import compilers_at_once, run_side_by_side

#: A module that runs until it is ended.
FOREVER = "http.server"


def test_results_and_added_up_progress_come_from_the_callers_thread() -> None:
    threads, reports, results = set(), [], {}
    both = threading.Barrier(2, timeout=60)

    def task(progress: Progress, children: ChildGroup) -> str:
        progress("compile", 0, 2)
        both.wait()  # deadlocks unless both run at once
        progress("compile", 1, 2)
        return threading.current_thread().name

    def progress(stage: str, done: int, total: int) -> None:
        threads.add(threading.current_thread())
        reports.append((stage, done, total))

    def finished(name: str, result: str) -> None:
        threads.add(threading.current_thread())
        results[name] = result

    run_side_by_side({"a": task, "b": task}, 2, progress, finished)
    assert set(results) == {"a", "b"}
    assert threading.current_thread().name not in results.values()
    assert threads == {threading.current_thread()}
    assert reports[-1] == ("compile; compile", 2, 4)


def endless(started: threading.Event, ends: list[int]):
    """A task that waits for a child for ever, and keeps how that ended."""

    def task(progress: Progress, children: ChildGroup) -> None:
        with ChildModule(FOREVER, "", children) as child:
            started.set()
            ends.append(child.wait().code)

    return task


def test_the_first_error_ends_the_processes_of_the_others() -> None:
    started, ends, threads = threading.Event(), [], threading.active_count()

    def fails(progress: Progress, children: ChildGroup) -> None:
        assert started.wait(60)
        raise BuildError("no such kernel")

    with pytest.raises(BuildError, match="no such kernel"):
        run_side_by_side({"endless": endless(started, ends), "fails": fails}, 2, no_progress, lambda *_: None)
    assert ends == [-9]
    assert threading.active_count() == threads


def test_ctrl_c_ends_the_processes_and_starts_no_other() -> None:
    started, ends, threads = threading.Event(), [], threading.active_count()

    def interrupt(stage: str, done: int, total: int) -> None:
        assert started.wait(60)
        raise KeyboardInterrupt

    def reports(progress: Progress, children: ChildGroup) -> None:
        progress("compile", 0, 1)

    def never(progress: Progress, children: ChildGroup) -> None:
        raise AssertionError("a task that waited for its turn was started")

    tasks = {"endless": endless(started, ends), "reports": reports, "other": endless(threading.Event(), ends)}
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side({**tasks, "never": never}, 2, interrupt, lambda *_: None)
    assert set(ends) == {-9}
    assert threading.active_count() == threads


def test_a_group_that_was_ended_starts_nothing() -> None:
    group = ChildGroup()
    group.end()
    with pytest.raises(CancelledError), ChildModule(FOREVER, "", group):
        raise AssertionError("it was started")


@pytest.mark.parametrize(("available", "expected"), [(0, 1), (3 * 2**30, 1), (100 * 2**30, 2)])
def test_compilers_run_side_by_side_where_memory_allows(
    available: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "fp16.weights"
    with weights.open("wb") as stream:
        stream.truncate(300 * 2**20)
    monkeypatch.setattr(targets, "_available_memory", lambda: available)
    monkeypatch.setattr(targets.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert compilers_at_once([weights]) == expected


def test_available_memory_is_what_the_system_says() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc")
    assert 2**20 < targets._available_memory() < 2**50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6 << 30),
        ({"memory.max": "max", "memory.current": "1"}, 6 << 30),
        ({"memory.max": str(4 << 30), "memory.current": str(1 << 30)}, 3 << 30),
        ({"memory.max": str(1 << 30), "memory.current": str(2 << 30)}, 0),
    ],
)
def test_a_container_has_no_more_than_its_share(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {6 << 20} kB\n", encoding="ascii")
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n", encoding="ascii")
    monkeypatch.setattr(targets, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(targets, "_CGROUP", tmp_path)
    assert targets._available_memory() == expected
