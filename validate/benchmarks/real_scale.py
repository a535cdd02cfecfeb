"""The ladder at the published size: D=5, C=1120, 16 heads, V=32,000 (157,094,080 parameters), FP32 and INT8 on a CPU.

``python validate/benchmarks/real_scale.py [--output FILE.json] [--folder FOLDER]`` makes a randomly initialised
checkpoint (seeded), builds ``ort-cpu-fp32`` and ``ort-cpu-int8``, takes them up the ladder with a short chain and
replays the bundle's self-test. Random weights predict the text worse than a uniform guess would, and there the gates on
likelihoods are not judged; ``not_judged`` of the result names them, level by level, with what the report says. Every
stage is a process of its own, so its wall time, CPU time and peak memory (VmHWM, all it ever held at once) are its own;
on a busy machine the CPU time is the one to read. The
token ids are the words of the demo's held-out text, each hashed to an id, so they are spread over the vocabulary and
recur as words do. Nothing is said about speed here: the model is untrained, the runs are short, and each stage starts
by reading and hashing files. Exit code 1 if a level or the self-test failed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ("ort-cpu-fp32", "ort-cpu-int8")
SELFTEST = "selftest"
LEVELS = ("contract", "one-step", "chain", "corpus", "free-running", "certificate")
#: What the names of the checks on likelihoods hold, which gate where a model predicts the text better than chance.
LIKELIHOODS = ("delta_nll", "mean_kl", "probability_change", "regime gap beyond FP32's", "handover beyond FP32's")
HELD_OUT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "heldout.txt"
MODEL: dict[str, Any] = {
    "model_type": "context_ready_transformer", "vocab_size": 32_000, "hidden_size": 1120, "num_hidden_layers": 5,
    "num_attention_heads": 16, "intermediate_size": 4480, "correction_intermediate_size": 4480,
    "max_position_embeddings": 1024, "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_layout": "interleaved",
    "unroll_steps": 5, "tie_word_embeddings": False, "tokenizer": "none", "training_sequence_length": 1024,
}  # fmt: skip
PARITY: dict[str, Any] = {
    "validation_tokens": 128, "window": 32, "window_batch": 4, "chain_windows": 2, "chain_steps": 16, "prompts": 4,
    "new_tokens": 8, "short_reason": "the published size, to see that memory and time hold",
}  # fmt: skip
MIB = 2**20


def write_checkpoint(folder: Path) -> None:
    """Random weights as those of ``crt-export init``, and the token ids."""
    import numpy as np

    from crt_export.checkpoint import write_checkpoint as write
    from crt_export.config import ModelConfig
    from crt_export.models.presets import random_tensors

    config = ModelConfig.from_dict(MODEL)
    write(folder / "checkpoint", config, random_tensors(config, seed=0))
    words = re.findall(r"\w+|[^\w\s]", HELD_OUT.read_text(encoding="utf-8"))
    ids = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % MODEL["vocab_size"] for word in words]
    np.save(folder / "tokens.npy", np.array(ids, np.int64))


def build(folder: Path) -> None:
    """Both targets, not validated: the levels follow one by one."""
    from crt_export.pipeline import BuildOptions
    from crt_export.pipeline import build as build_bundle

    build_bundle(
        BuildOptions(
            checkpoint=folder / "checkpoint",
            output=folder / "bundle",
            targets=TARGETS,
            tokens=folder / "tokens.npy",
            validated=False,
        )
    )


def run_level(folder: Path, level: str) -> list[dict[str, Any]]:
    """One level of both targets."""
    from crt_export.parity import ParityOptions, validate_bundle

    options = ParityOptions(levels=(level,), **PARITY)
    report = validate_bundle(folder / "bundle", tokens=folder / "tokens.npy", options=options)
    return [
        {
            "target": result.target,
            "level": level,
            "passed": result.passed,
            "failures": list(result.failures),
            "not_judged": [
                check.name
                for check in result.checks
                if check.passed is None and any(words in check.name for words in LIKELIHOODS)
            ],
            "notes": list(report.notes),
        }
        for result in report.levels
    ]


def replay(folder: Path) -> list[dict[str, Any]]:
    """The self-test of both targets."""
    from crt_export.selftest import run_selftest

    return [
        {
            "target": result.target,
            "level": SELFTEST,
            "passed": result.status == "passed",
            "failures": [*result.failures, *([result.reason] if result.reason else [])],
        }
        for result in run_selftest(folder / "bundle", TARGETS).targets
    ]


def run_stage(stage: str, folder: Path) -> None:
    """One stage in this process; leaves ``STAGE.json`` in the folder."""
    stages: dict[str, Callable[[Path], Any]] = {"checkpoint": write_checkpoint, "build": build, SELFTEST: replay}
    results = stages[stage](folder) if stage in stages else run_level(folder, stage)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None, "Linux tells the peak memory of a process in /proc/self/status"
    peak = int(match[1]) * 1024
    result = {"peak_memory": peak, "cpu_seconds": round(time.process_time(), 1), "levels": results or []}
    (folder / f"{stage}.json").write_text(json.dumps(result))


def measure(folder: Path) -> dict[str, Any]:
    """Every stage in a process of its own."""
    stages, levels = [], []
    for stage in ("checkpoint", "build", *LEVELS, SELFTEST):
        begin = time.perf_counter()
        subprocess.run([sys.executable, __file__, "--stage", stage, "--folder", str(folder)], check=True)
        seconds = time.perf_counter() - begin
        found = json.loads((folder / f"{stage}.json").read_text())
        cpu, peak = found["cpu_seconds"], found["peak_memory"] // MIB
        stages.append({"stage": stage, "seconds": round(seconds, 1), "cpu_seconds": cpu, "peak_memory_mib": peak})
        levels += found["levels"]
        sys.stdout.write(f"{stage:14}{seconds:8.1f} s{cpu:8.1f} CPU s{peak:8,} MiB\n")
        sys.stdout.flush()
    return {
        **surroundings(),
        "model": MODEL,
        "parity": PARITY,
        "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in stages), 1),
        "stages": stages,
        "not_judged": not_judged(levels),
        "levels": levels,
    }


def not_judged(levels: list[dict[str, Any]]) -> dict[str, Any]:
    """Takes the checks on likelihoods that gated nothing, and the notes on why, out of the levels; by level, target."""
    found: dict[str, Any] = {}
    for level in levels:
        checks, notes = level.pop("not_judged", []), level.pop("notes", [])
        if checks:
            found.setdefault(level["level"], {"notes": notes})[level["target"]] = checks
    return found


def surroundings() -> dict[str, Any]:
    """When, on what, with what."""
    from crt_export.environment import installed_versions
    from crt_export.machine import machine

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": machine(),
        "versions": installed_versions(("crt-export", "torch", "onnx", "onnxruntime", "numpy")),
        "command": "python validate/benchmarks/real_scale.py",
    }


def main() -> int:
    """Measure, print a table, write the file; 1 if a level or the self-test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    parser.add_argument("--folder", type=Path, help="keep checkpoint and bundle in this empty folder")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(prefix="real-scale-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder)
    for level in result["levels"]:
        verdict = {True: "passed", False: "FAILED", None: "run"}[level["passed"]]
        sys.stdout.write(f"{level['target']:14} {level['level']:14} {verdict}\n")
        sys.stdout.writelines(f"  {failure}\n" for failure in level["failures"])
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(level["passed"] is not False for level in result["levels"]) else 1


if __name__ == "__main__":
    sys.exit(main())
