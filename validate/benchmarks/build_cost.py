"""Time and memory of a build per stage, for the published sizes, and of the same build with its stages stored.

    python validate/benchmarks/build_cost.py --preset d5-1120 --output validate/results/build_cost.json

Every build runs in a process of its own, on a random checkpoint of ``crt-export init``. It calibrates on the held-out
text's words, hashed to token ids, and validates on ids that are spread over the whole vocabulary: a random model
predicts a text of a few common words better or worse than a uniform guess by luck, and with it whether likelihoods are
gated; those ids it predicts worse. Validation is the short one. Per stage: seconds, CPU seconds of the process
and its children, and the peak of the process's resident memory; of the build also the peak of its largest child, an
engine compiler or the process that traces graphs. ``rebuild`` builds once more with one more target, and reuses the
stored stages.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crt_export.models.presets import PRESETS

HELD_OUT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "heldout.txt"
TARGETS = ("ort-cpu-fp32", "ort-cpu-int8", "rtx-sm80-fp16", "rtx-sm80-int8")
BUILDS = {"build": TARGETS, "rebuild": (*TARGETS, "ort-cuda-fp16")}
CALIBRATED = 4096
REASON = "what a build of the published size costs"


@dataclass
class Stages:
    """A progress callback that adds up what passes between a stage and the next."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    _name: str = ""
    _begin: float = 0.0
    _cpu: float = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Close the last stage where a new one begins."""
        if stage != self._name:
            self.close()
            self._name = stage

    def close(self) -> None:
        """Write down the last stage and start counting anew."""
        now, cpu = time.perf_counter(), _cpu_seconds()
        if self._name:
            row = {"stage": self._name, "seconds": round(now - self._begin, 1)}
            self.rows.append({**row, "cpu_seconds": round(cpu - self._cpu, 1), "peak_memory_mib": _peak_mib()})
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from what is held
        self._name, self._begin, self._cpu = "", now, cpu


def _cpu_seconds() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def _peak_mib() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None, "Linux tells the peak memory of a process in /proc/self/status"
    return int(match[1]) // 1024


def prepare(preset: str, folder: Path) -> None:
    """The checkpoint and the token ids."""
    import numpy as np

    from crt_export.models.presets import write_preset

    config = write_preset(preset, folder / "checkpoint")
    words = re.findall(r"\w+|[^\w\s]", HELD_OUT.read_text(encoding="utf-8"))
    words = [word if index < CALIBRATED else f"{word} {index}" for index, word in enumerate(words)]
    ids = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % config.vocab_size for word in words]
    np.save(folder / "tokens.npy", np.array(ids, np.int64))


def run_build(name: str, folder: Path) -> None:
    """One build in this process; leaves ``NAME.json``."""
    from crt_export.errors import ParityError
    from crt_export.pipeline import BuildOptions, build

    stages, begin = Stages(), time.perf_counter()
    stages.close()
    options = BuildOptions(
        checkpoint=folder / "checkpoint",
        output=folder / "bundle",
        targets=BUILDS[name],
        tokens=folder / "tokens.npy",
        short_reason=REASON,
        cache=folder / "cache",
    )
    failed: list[str] = []
    try:
        build(options, progress=stages)
    except ParityError as error:  # all was done; random weights have close calls, which few tokens may not average out
        failed = str(error).splitlines()
    stages.close()
    write_result(name, folder, stages, time.perf_counter() - begin, failed)


def write_result(name: str, folder: Path, stages: Stages, seconds: float, failed: list[str]) -> None:
    """``NAME.json``, and a table on stdout; ``failed``: what parity found, in the words of the build."""
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    result = {
        "targets": list(BUILDS[name]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu_seconds(), 1),
        "peak_memory_mib": max(row["peak_memory_mib"] for row in stages.rows),
        "peak_memory_of_largest_child_mib": child,
        "parity_failed": failed,
        "stages": stages.rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    for row in [*stages.rows, {**result, "stage": "in all"}]:
        sys.stdout.write(
            f"{name:8}{row['stage'][:60]:62}{row['seconds']:8.1f} s{row['cpu_seconds']:8.1f} CPU s"
            f"{row['peak_memory_mib']:8,} MiB\n"
        )


def measure(preset: str, folder: Path, builds: Iterable[str]) -> dict[str, Any]:
    """The builds of one size."""
    prepare(preset, folder)
    found = {}
    for name in builds:
        subprocess.run([sys.executable, __file__, "--run", name, "--folder", str(folder)], check=True)
        found[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    found["model"] = PRESETS[preset].to_dict()
    return found


def main() -> int:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=[*PRESETS], help="a size; may be repeated; default: all")
    parser.add_argument("--no-rebuild", action="store_true", help="one build of every size only")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=[*BUILDS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_build(arguments.run, arguments.folder)
        return 0
    presets = {}
    for preset in arguments.preset or [name for name in PRESETS if name != "tiny"]:
        with tempfile.TemporaryDirectory(prefix="build-cost-") as temporary:
            builds = [name for name in BUILDS if name == "build" or not arguments.no_rebuild]
            presets[preset] = measure(preset, Path(temporary), builds)
    if arguments.output:
        from crt_export.environment import installed_versions
        from crt_export.machine import machine

        document = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": f"python validate/benchmarks/build_cost.py {' '.join(sys.argv[1:])}",
            "hardware": machine(),
            "versions": installed_versions(("crt-export", "torch", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")),
            "presets": presets,
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
