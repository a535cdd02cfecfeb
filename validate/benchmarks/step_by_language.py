"""A step in C++ against the same step in Python, on one bundle: ``python step_by_language.py BUNDLE TARGET...``.

Each language is a process of its own. They take turns on the same positions, one block of steps each, so that a machine
that gets slower gets slower for both; the ratio is that of the blocks' medians, round by round. Prints a JSON object
and ends with 1 if the median ratio of a target is above ``--limit``, with 2 if one could not be measured. The C++
program is made by ``make cpp``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from crt_export.runtime import Session, load_bundle

PROGRAM = Path(__file__).resolve().parents[2] / "build" / "cpp" / "benchmarks" / "bench_step"
WARM_UP = 3


def token_at(position: int, vocab: int) -> int:
    """Some id of the vocabulary, another one at every position; the same in bench_step.cpp."""
    return (7 * position + 1) % vocab


def answer(session: Session, position: int, count: int) -> list[float]:
    """Milliseconds of each of ``count`` steps from ``position`` tokens on."""
    held, times = int(session.position[0]), []
    if held > position:
        session.reset()
        held = 0
    for place in range(held, position):
        session.step([token_at(place, session.vocab_size)])
    for place in range(position, position + count):
        token = [token_at(place, session.vocab_size)]
        begin = time.perf_counter()
        session.step(token)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def work(path: str, target: str, threads: int) -> None:
    """The Python side: answers lines "POSITION COUNT" as bench_step does."""
    with (
        load_bundle(path, allow_unvalidated=True) as bundle,
        bundle.session(target, threads=threads) as session,
    ):
        for line in sys.stdin:
            position, count = map(int, line.split())
            sys.stdout.write(json.dumps(answer(session, position, count)) + "\n")
            sys.stdout.flush()


class Candidate:
    """One language's process."""

    def __init__(self, command: list[str]) -> None:
        """Start it."""
        self._command = command
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def block(self, position: int, count: int) -> list[float]:
        """Milliseconds of ``count`` steps after ``WARM_UP`` more that are not counted."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{position} {count + WARM_UP}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.stderr.write(f"{self._command[0]} ended with {self._process.wait()}\n")
            raise SystemExit(2)
        return json.loads(line)[WARM_UP:]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def compared(path: str, target: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of both languages, and the ratio C++ / Python."""
    candidates = {
        "python": Candidate([sys.executable, __file__, path, target, "--threads", str(options.threads), "--work"]),
        "cpp": Candidate([str(options.program), path, target, str(options.threads)]),
    }
    blocks: dict[str, list[float]] = {name: [] for name in candidates}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    try:
        for number in range(options.rounds):
            order = list(candidates)[:: 1 if number % 2 else -1]
            for name in order:
                times = candidates[name].block(options.position, options.steps)
                time.sleep(0.05)  # threads that spin on after their last step get the time to sleep
                blocks[name].append(median(times))
                samples[name] += times
    finally:
        for candidate in candidates.values():
            candidate.close()
    ratios = sorted(cpp / python for cpp, python in zip(blocks["cpp"], blocks["python"], strict=True))
    quarter = len(ratios) // 4
    return {
        "target": target,
        "position": options.position,
        "rounds": options.rounds,
        "steps_per_turn": options.steps,
        "p50_ms": {name: round(median(times), 3) for name, times in samples.items()},
        "cpp_over_python": {
            "p25": round(ratios[quarter], 4),
            "p50": round(median(ratios), 4),
            "p75": round(ratios[-1 - quarter], 4),
        },
    }


def main() -> int:
    """Parse, measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--position", type=int, default=64, help="tokens in the cache (64)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30, help="steps of a round (30)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes every core")
    parser.add_argument("--limit", type=float, default=1.02, help="largest ratio that passes (1.02)")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="bench_step")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.bundle, options.targets[0], options.threads)
        return 0
    if not options.program.is_file():
        parser.error(f"{options.program} is missing: make cpp builds it")
    results = [compared(options.bundle, target, options) for target in options.targets]
    record = {
        "bundle": Path(options.bundle).name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "limit": options.limit,
        "targets": results,
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return int(any(result["cpp_over_python"]["p50"] > options.limit for result in results))


if __name__ == "__main__":
    sys.exit(main())
