"""Run what waits for child processes side by side, and report and fail as if one thing were done after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from crt_export.child_process import ChildGroup
from crt_export.progress import Progress

Result = TypeVar("Result")
#: What is to be done: it reports to the progress given and starts its processes in the group.
Task = Callable[[Progress, ChildGroup], Result]
_POLL_SECONDS = 0.1
#: A third would gain little and need gigabytes.
_MOST_COMPILERS = 2
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def run_side_by_side(
    tasks: Mapping[str, Task[Result]],
    workers: int,
    progress: Progress,
    finished: Callable[[str, Result], None],
) -> None:
    """Run tasks in threads of their own until all are done or one fails, whose processes then end at once.

    Args:
        tasks: By name.
        workers: How many run at a time.
        progress: Told from this thread: the stages of all that run, their units added up.
        finished: Called from this thread with the name and result of every task.

    Raises:
        BaseException: Whatever the first task to fail, ``progress`` or ``finished`` raised, Ctrl-C among them. No
            thread and no process is left then.
    """
    reports: SimpleQueue[tuple[str, str, int, int]] = SimpleQueue()
    stages: dict[str, tuple[str, int, int]] = {}
    children = ChildGroup()
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        running = {pool.submit(task, _reporter(name, reports), children): name for name, task in tasks.items()}
        while running:
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            while not reports.empty():
                name, stage, units, total = reports.get()
                stages[name] = (stage, units, total)
                _report(stages, progress)
            for future in done:
                finished(running.pop(future), future.result())
    finally:
        children.end()
        pool.shutdown(wait=True, cancel_futures=True)


def compilers_at_once(weights: Iterable[Path]) -> int:
    """How many compilers this machine has cores and memory for, one at least.

    Args:
        weights: Weight files of the graphs that are compiled.
    """
    # Measured with TensorRT-RTX 1.7: 0.4 GB without weights, 2.0 GB with 0.3 GB of them.
    each = 2**30 + 4 * max((path.stat().st_size for path in weights), default=0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(cores, _MOST_COMPILERS, _available_memory() // each))


def _available_memory() -> int:
    """Bytes that can be had without swapping, of a container's share too; 0 where the system does not say."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    machine = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or "max": no limit
        return machine
    return max(0, min(machine, limit - used))


def _reporter(name: str, reports: SimpleQueue[tuple[str, str, int, int]]) -> Progress:
    def report(stage: str, done: int, total: int) -> None:
        reports.put((name, stage, done, total))

    return report


def _report(stages: Mapping[str, tuple[str, int, int]], progress: Progress) -> None:
    phrases, done, total = zip(*stages.values(), strict=True)
    progress("; ".join(phrases), sum(done), sum(total))
