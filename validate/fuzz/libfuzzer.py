"""Run the libFuzzer targets of the C++ parsers: python validate/fuzz/libfuzzer.py --build build/cpp-fuzz --seconds 5.

make fuzzers builds them, with clang. Each starts from the golden files and what the mutators make of them. Prints how
many inputs each ran; exits with 1 where one broke a parser, whose input then lies in --folder.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cases import inputs_of_case, new_case
from seeds import BUNDLE, PROFILE, ROOT, SIDECAR, SNAPSHOT, TARGET, write_seeds

EXIT_FINDING, EXIT_ENVIRONMENT = 1, 3
#: Target to the kinds of the mutators whose inputs it starts from.
TARGETS: dict[str, tuple[str, ...]] = {
    "manifest": ("manifest",),
    "safetensors": ("snapshot", "vectors"),
    "external_data": ("onnx",),
    "sidecar": ("sidecar",),
    "profile": (),
    "text": (),
}
_DAMAGED_SEEDS = 20
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one target did: its name, inputs it ran, and the end of its log where it broke."""

    target: str
    inputs: int
    broken: str


def run_targets(build: Path, seconds: int, seed: int, folder: Path, jobs: int = 2) -> list[Run]:
    """Run every target for that long, some at a time.

    Raises:
        FileNotFoundError: A target was not built.
    """
    programs = {name: build / "fuzz" / f"fuzz_{name}" for name in TARGETS}
    for program in programs.values():
        if not program.is_file():
            raise FileNotFoundError(f"there is no {program}: make fuzzers builds it")
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="crt_libfuzzer_"))
    try:
        _write_corpora(scratch, seed)
        with ThreadPoolExecutor(jobs) as pool:
            started = [
                pool.submit(_run, name, program, scratch / "corpora" / name, seconds, seed, folder)
                for name, program in programs.items()
            ]
            return [run.result() for run in started]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(name: str, program: Path, corpus: Path, seconds: int, seed: int, folder: Path) -> Run:
    command = [
        str(program), str(corpus), f"-max_total_time={seconds}", f"-seed={seed + 1}", f"-max_len={_MOST_BYTES}",
        "-print_final_stats=1", "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/libfuzzer-{name}-",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, check=False)
    log = ran.stderr.decode(errors="replace")
    counted = re.search(r"stat::number_of_executed_units: *(\d+)", log)
    return Run(target=name, inputs=int(counted[1]) if counted else 0, broken=log[-3000:] if ran.returncode else "")


def _write_corpora(scratch: Path, seed: int) -> None:
    """Sound files for every target, and what the mutators make of them."""
    seeds = scratch / "seeds"
    seeds.mkdir()
    write_seeds(seeds)
    bundle = seeds / BUNDLE
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    sound: dict[str, list[bytes]] = {
        "manifest": [(bundle / "manifest.json").read_bytes()],
        "safetensors": [(seeds / SNAPSHOT).read_bytes(), (bundle / "selftest" / "vectors.safetensors").read_bytes()],
        "external_data": [path.read_bytes() for path in sorted((bundle / "graphs").glob("*.onnx"))],
        "sidecar": [(seeds / SIDECAR).read_bytes()],
        "profile": [json.dumps(manifest["targets"][TARGET]["profile"]).encode(), (seeds / PROFILE).read_bytes()],
        "text": ["The quick\0 é \U0001f600 aab".encode(), b"\xf0\x9f\x98", b"\xc3\x28\xff"],
    }
    for name, kinds in TARGETS.items():
        folder = scratch / "corpora" / name
        folder.mkdir(parents=True)
        cases = [new_case(kind, seed, number) for kind in kinds for number in range(_DAMAGED_SEEDS)]
        damaged = [content.data for case in cases for content in inputs_of_case(case, seeds).files.values()]
        for number, content in enumerate((*sound[name], *damaged)):
            (folder / str(number)).write_bytes(content[:_MOST_BYTES])


def main(arguments: list[str]) -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cpp-fuzz")
    parser.add_argument("--seconds", type=int, default=5, help="of each target (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="for inputs that broke a parser")
    options = parser.parse_args(arguments)
    try:
        runs = run_targets(options.build, options.seconds, options.seed, options.folder)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ENVIRONMENT
    for run in runs:
        sys.stdout.write(f"libfuzzer {run.target:<14} {run.inputs:>9} inputs  {'BROKEN' if run.broken else 'ok'}\n")
        sys.stdout.write(run.broken)
    return EXIT_FINDING if any(run.broken for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
