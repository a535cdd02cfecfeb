"""Seconds for a prompt by the size of its chunks, ``prefill(..., chunk=N)``: what ``build/prefill.py`` chose by.

    python validate/benchmarks/prompt_chunks.py build/presets/d5-1120/bundle build/presets/d1-2048/bundle build/demo

Every size takes its turn in every round, so that a machine's drift meets all of them alike. A number of passes is made
over each chunk, so a chunk costs the same per token wherever products are bound by arithmetic; small ones read the
weights more often, large ones score more pairs of positions. Where the target's own prompts are adaptive, those are
measured too: there a smaller chunk can also end after fewer passes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crt_export import load_bundle
from crt_export.environment import installed_versions
from crt_export.errors import UnsupportedError
from crt_export.machine import machine
from crt_export.runtime import Session

HELD_OUT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "heldout.txt"
CHUNKS = (64, 128, 256, 512, 1024)
TOKENS = 1024
PASSES = 7  # what the trained demo takes on the mean


def seconds_by_chunk(session: Session, rounds: int, passes: int | Literal["adaptive"]) -> dict[int, float]:
    """The median over the rounds, of every chunk."""
    found: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    text = np.frombuffer(HELD_OUT.read_bytes(), np.uint8).astype(np.int64) % session.vocab_size
    session.prefill([text[:16]], passes=passes)  # the first call is slower
    for index in range(rounds):
        prompt = text[index * TOKENS : (index + 1) * TOKENS]
        for chunk in CHUNKS:
            session.reset()
            begin = time.perf_counter()
            session.prefill([prompt], passes=passes, chunk=chunk)
            found[chunk].append(time.perf_counter() - begin)
    return {chunk: round(statistics.median(seconds), 4) for chunk, seconds in found.items()}


def measured(path: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Every CPU target of a bundle and every way; prints a line each."""
    ways: tuple[int | Literal["adaptive"], ...] = (PASSES, "adaptive")
    with load_bundle(path, allow_unvalidated=True) as bundle:
        for target in [name for name in bundle.targets if name.startswith("ort-cpu")]:
            for way in ways:
                with bundle.session(target, capacity=TOKENS) as session:
                    try:
                        seconds = seconds_by_chunk(session, rounds, way)
                    except UnsupportedError:  # a target without a bound is never adaptive
                        continue
                shown = "  ".join(f"{chunk}: {value:.3f} s" for chunk, value in seconds.items())
                sys.stdout.write(f"{path}  {target:14} passes {way!s:9} {shown}\n")
                sys.stdout.flush()
                yield {"bundle": str(path), "target": target, "passes": way, "seconds": seconds}


def main() -> int:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    arguments = parser.parse_args()
    rows = [row for bundle in arguments.bundles for row in measured(bundle, arguments.rounds)]
    if arguments.output:
        document = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": "python validate/benchmarks/prompt_chunks.py " + " ".join(map(str, arguments.bundles)),
            "hardware": machine(),
            "versions": installed_versions(("crt-export", "onnxruntime", "numpy")),
            "tokens": TOKENS,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
