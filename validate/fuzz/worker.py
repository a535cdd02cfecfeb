"""One process that tries inputs in one language: a line of JSON per input on stdin, one per answer on stdout.

A crash of the process names its input, for the driver knows what it asked last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from planted_faults import plant_fault
from stages import Finding

#: Beyond what the process had before its first input.
MOST_MEMORY = 1536 << 20
MOST_ADDRESSES = 3 << 30


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--language", choices=("python", "cpp"), required=True)
    parser.add_argument("--seeds", type=Path, required=True)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--kinds", nargs="+", required=True)
    parser.add_argument("--fault", default="")
    parser.add_argument("--sanitized", action="store_true")
    options = parser.parse_args()
    # Libraries print at the level of the file; the answers go to the stdout that was given.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("error")
    plant_fault(options.fault)
    probe = _probe(options)
    for kind in options.kinds:  # imports and caches are not the memory of an input
        probe.probe(kind, options.seeds, [97])
    if not options.sanitized:
        most = _status("VmSize") + MOST_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    before = _status("VmRSS")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(probe, json.loads(line), before)), file=answers, flush=True)


def _probe(options: argparse.Namespace) -> Any:
    if options.language == "python":
        from python_probe import PythonProbe

        return PythonProbe(options.seeds)
    from cpp_probe import CppProbe

    return CppProbe(options.seeds, options.library)


def _answer(probe: Any, asked: dict[str, Any], before: int) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.monotonic()
    answer: dict[str, Any] = {"finding": None}
    try:
        answer |= probe.probe(asked["kind"], Path(asked["folder"]), asked["ids"]).to_dict()
    except Finding as finding:
        answer["finding"] = str(finding)
    except BaseException as error:
        answer["finding"] = f"{type(error).__name__}: {error}"[:600]
    peak = _status("VmHWM") - before
    if answer["finding"] is None and peak > MOST_MEMORY:
        answer["finding"] = f"memory: the peak is {peak >> 20} MiB above that of the start"
    return {**answer, "seconds": time.monotonic() - start}


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
