"""The guard of the performance targets: ``python validate/benchmarks/ratios.py --folder FOLDER [--output FILE.json]``.

Measures the two published CRT sizes on this machine with ``crt-export bench`` (random checkpoints and bundles are made
in FOLDER, those that are there are used again), prints every target with its figure and verdict, and ends with 1 if one
falls short. Every target is a ratio within one run, or a time with its condition, so that machines can be compared; run
it on a machine that does nothing else. ``--trained BUNDLE`` adds the target on prompts of a trained model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from performance_targets import (
    FALLS_SHORT,
    FASTER,
    FP32,
    INT8,
    NOT_JUDGED,
    Line,
    language_line,
    prefill_lines,
    pytorch_lines,
    step_lines,
    trained_line,
)
from preset_bundles import PresetFolder, preset_folder

from crt_export.bench.options import BenchOptions
from crt_export.bench.run import run_bench
from crt_export.config import load_config

SIZES = ("d5-1120", "d1-2048")
#: Lengths of prompts and how often each is fed: the long ones take minutes.
PROMPTS = (((16, 64), 5), ((256, 1024), 1))
CAPACITY = 1024
CPP = Path(__file__).resolve().parents[2] / "build" / "cpp" / "benchmarks" / "bench_step"


def measured_lines(size: str, place: PresetFolder, options: argparse.Namespace) -> Iterator[Line]:
    """Every target of one size, as it is measured."""
    carried = load_config(place.checkpoint).carried
    into_page_cache(place.bundle / "graphs")
    # Two runs: one with PyTorch takes longer, and the read rate drifts meanwhile.
    yield from step_lines(size, steps(place.bundle, (FP32,), options.rounds), carried, CAPACITY)
    yield from pytorch_lines(size, steps(place.bundle, tuple(FASTER), options.rounds))
    for target in (FP32, INT8):
        yield language(size, target, place)
    for target in (FP32, INT8):
        for lengths, rounds in PROMPTS:
            document = prompts(place.bundle, target, (carried.passes, "exact"), lengths, rounds)
            yield from prefill_lines(size, target, document)


def into_page_cache(folder: Path) -> None:
    """Read every file, so that the time to the first token is the package's and not the disk's."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def steps(bundle: Path, against: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """A benchmark of the int8 target's steps; there are few prompts in it."""
    options = BenchOptions(target=INT8, against=against, prompt_tokens=(64,), rounds=rounds, prefill_rounds=1)
    return run_bench(bundle, options).to_dict()


def prompts(
    bundle: Path, target: str, passes: tuple[int | str, ...], lengths: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """A benchmark of prompts; the steps in it are few."""
    options = BenchOptions(
        target=target, prompt_tokens=lengths, passes=passes, rounds=1, steps=4, prefill_rounds=rounds
    )
    return run_bench(bundle, options).to_dict()


def language(size: str, target: str, place: PresetFolder) -> Line:
    """C++ against Python, where ``make cpp`` has built it."""
    if not CPP.is_file():
        return language_line(size, target, None, "make cpp builds the program")
    script = Path(__file__).with_name("step_by_language.py")
    command = [sys.executable, str(script), str(place.bundle), target, "--rounds", "8", "--steps", "20"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    try:
        return language_line(size, target, json.loads(done.stdout))
    except ValueError:
        return language_line(size, target, None, f"step_by_language.py ended with {done.returncode}")


def trained(bundle: Path | None) -> Line:
    """The target on a trained model's prompts."""
    length = PROMPTS[-1][0][-1]
    return trained_line(None if bundle is None else prompts(bundle, FP32, ("exact",), (length,), 9), length)


def main(words: list[str] | None = None) -> int:
    """Measure, print, write the file; 1 where a target falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and bundles, made where missing")
    parser.add_argument("--size", action="append", choices=SIZES, help="one of the sizes only")
    parser.add_argument("--trained", type=Path, metavar="BUNDLE", help="a bundle of a trained checkpoint")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of steps of each candidate")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    options = parser.parse_args(words)
    places = {size: preset_folder(options.folder, size, say) for size in options.size or SIZES}
    begin, lines = time.perf_counter(), []
    for line in every_line(places, options):
        lines.append(line)
        say(line.text())
    taken = round(time.perf_counter() - begin, 1)
    short = [line for line in lines if line.verdict == FALLS_SHORT]
    missing = sum(line.verdict == NOT_JUDGED for line in lines)
    say(f"{len(short)} of {len(lines)} figures fall short, {missing} are not judged, in {taken:.0f} s")
    if options.output:
        options.output.write_text(json.dumps(result_of(lines, options, taken), indent=1) + "\n", encoding="utf-8")
    return 1 if short else 0


def every_line(places: dict[str, PresetFolder], options: argparse.Namespace) -> Iterator[Line]:
    """Size by size, then the trained model."""
    for size, place in places.items():
        yield from measured_lines(size, place, options)
    yield trained(options.trained)


def result_of(lines: list[Line], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """When, on what, with what, and every target."""
    from crt_export.environment import installed_versions
    from crt_export.machine import machine

    return {
        "format": "crt-export-ratios",
        "format_version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            [
                f"python validate/benchmarks/ratios.py --folder FOLDER --rounds {options.rounds}",
                *(f"--size {size}" for size in options.size or ()),
                *(["--trained BUNDLE"] if options.trained else []),
            ]
        ),
        "hardware": machine(),
        "versions": installed_versions(("crt-export", "torch", "onnxruntime", "numpy")),
        "options": {
            "rounds": options.rounds,
            "prompts": [list(lengths) for lengths, _rounds in PROMPTS],
            "capacity": CAPACITY,
            "batch": 1,
        },
        "seconds": seconds,
        "lines": [line.to_dict() for line in lines],
    }


def say(text: str) -> None:
    """Write a line to the terminal at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
