"""What a session costs on top of the bare run of its step graph, in Python and in C++.

``python validate/benchmarks/session_overhead.py BUNDLE TARGET...`` prints microseconds per token, one thread. Bare
runs, ``step()``, ``advance()`` and a greedy generation take turns in one process, so that a machine that gets slower
gets slower for all of them; the figures are medians over the rounds. The C++ row is there if ``make cpp`` was run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from crt_export.runtime import Bundle, GenerationOptions, Session, load_bundle
from crt_export.runtime.opening import engine_from_target
from crt_export.runtime.rows import Batch
from crt_export.runtime.tensors import SessionTensors

TOKENS, ROUNDS, CAPACITY = 200, 25, 256
PROGRAM = Path(__file__).resolve().parents[2] / "build" / "cpp" / "benchmarks" / "session_overhead"


def python_figures(bundle: Bundle, name: str) -> dict[str, float]:
    """Median microseconds per token of every loop."""
    target = bundle.target(name)
    engine = engine_from_target(bundle.files, target, bundle.model, 1)
    tensors = SessionTensors(engine, target.sizes(bundle.model, 1, CAPACITY))
    launch = tensors._step_launch(Batch(0, 1, 1))  # the very launch that a session makes
    options = GenerationOptions(max_new_tokens=TOKENS, ignore_eos=True)

    def bare(session: Session) -> None:
        for _ in range(TOKENS):
            launch()

    def step(session: Session) -> None:
        for _ in range(TOKENS):
            session.step([0])

    def advance(session: Session) -> None:
        for _ in range(TOKENS):
            session.advance(session.next_tokens)

    def generate(session: Session) -> None:
        for _ in session.generate(None, options):
            pass

    with bundle.session(name, threads=1, capacity=CAPACITY) as session:
        loops = {loop.__name__: loop for loop in (bare, step, advance, generate)}
        rounds = [{name: timed(loop, session) for name, loop in loops.items()} for _ in range(ROUNDS)]
    return {name: median(times[name] for times in rounds) for name in loops}


def timed(loop: Callable[[Session], None], session: Session) -> float:
    """Microseconds per token of one loop that starts after one token."""
    session.reset()
    session.prefill([[1]])
    begin = time.perf_counter()
    loop(session)
    return (time.perf_counter() - begin) / TOKENS * 1e6


def cpp_figures(path: str, target: str) -> dict[str, float]:
    """The same, measured by the C++ program."""
    command = [str(PROGRAM), path, target, "1"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout)


def main() -> None:
    path, *targets = sys.argv[1:]
    sys.stdout.write("microseconds per token     bare    step  advance  generate\n")
    with load_bundle(path, allow_unvalidated=True) as bundle:
        for target in targets or bundle.targets:
            rows = {"Python": python_figures(bundle, target)}
            if PROGRAM.is_file():
                rows["C++"] = cpp_figures(path, target)
            for language, row in rows.items():
                over = [f"{row[name] - row['bare']:+8.1f}" for name in ("step", "advance", "generate")]
                sys.stdout.write(f"{target:16} {language:7} {row['bare']:7.1f} {' '.join(over)}\n")


if __name__ == "__main__":
    main()
