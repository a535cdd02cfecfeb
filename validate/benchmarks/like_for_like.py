"""CRT against a plain transformer through the same backend, on a CPU: the comparison that has not been published.

``python validate/benchmarks/like_for_like.py --folder FOLDER [--output FILE.json]`` makes random checkpoints of the
published sizes and their bundles in FOLDER (those that are there are used again), then times one decode step of each
pair in turns: PyTorch eagerly, through torch.compile, ONNX Runtime in FP32 and with 8-bit weights. It prints a Markdown
table: how many times faster the CRT is, with a 95 % interval, beside what the paper reports (A100, eager, BF16), and
what explains it: bytes a token, size of the cache, kernels launched. The GPU half is validate/device/gpu_bench.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launches import kernels_of_onnxruntime, operators_of_pytorch
from paired_steps import PairedSteps, Side, measure_pair, side_figures
from preset_bundles import PresetFolder, preset_folder

from crt_export.bench.rounds import quantiles
from crt_export.config import load_config
from crt_export.errors import CrtExportError

#: CRT, transformer, and how many times faster the CRT is in the paper (A100, eager PyTorch, BF16, batch 1).
PAIRS = (("d5-1120", "transformer-12x768", 1.74), ("d1-2048", "transformer-6x1088", 2.6))
#: Backend -> what its worker runs.
PYTORCH = {"PyTorch eager FP32": "pytorch-eager", "torch.compile FP32": "pytorch-compile"}
ONNXRUNTIME = {"ONNX Runtime FP32": "ort-cpu-fp32", "ONNX Runtime INT8": "ort-cpu-int8"}
BACKENDS = (*PYTORCH, *ONNXRUNTIME)
HOLDS, SHRINKS, VANISHES, REVERSES = "holds", "shrinks", "vanishes", "reverses"


def side_of(preset: str, place: PresetFolder, backend: str, *, capacity: int, threads: int) -> Side:
    """What a backend runs of a preset."""
    config = load_config(place.checkpoint)
    request: dict[str, Any] = {"batch": 1, "threads": threads}
    if backend in PYTORCH:
        request |= {"kind": PYTORCH[backend], "config": config.to_dict(), "capacity": capacity}
        request["reference"] = str(place.checkpoint)
    else:
        request |= {"kind": "bundle", "path": str(place.bundle), "target": ONNXRUNTIME[backend]}
    return Side(name=f"{preset}, {backend}", request=request, model=config.info)


def launches_of(backend: str, place: PresetFolder) -> int | None:
    """Kernels or operators of a step; None for compiled code, whose loops are no launches."""
    if backend in ONNXRUNTIME:
        return kernels_of_onnxruntime(place.bundle, ONNXRUNTIME[backend])
    return operators_of_pytorch(load_config(place.checkpoint)) if "eager" in backend else None


def entry_of(steps: PairedSteps, published: float, launches: Sequence[int | None]) -> dict[str, Any]:
    """One position of a pair on a backend."""
    ratio = steps.ratio
    figures: dict[str, Any] = {"position": steps.position}
    for name, blocks, cost, count in zip(
        ("crt", "transformer"), (steps.first, steps.second), steps.bytes, launches, strict=True
    ):
        figures[name] = {**side_figures(blocks, cost, steps.read_gb_s), "launches": count}
    values = {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
    figures |= {key: float(f"{value:.4g}") for key, value in values.items()} | {"rounds": len(steps.first)}
    rates = quantiles(steps.read_gb_s)
    figures["read_gb_s"] = {"p10": round(rates.p10, 2), "p50": round(rates.p50, 2), "p90": round(rates.p90, 2)}
    return {**figures, "published_ratio": published, "advantage": advantage(ratio.low, ratio.high, published)}


def advantage(low: float, high: float, published: float) -> str:
    """What becomes of the published advantage, judged by the interval of the ratio."""
    if high < 1:
        return REVERSES
    if low <= 1:
        return VANISHES
    return HOLDS if high >= published else SHRINKS


def compare(places: Mapping[str, PresetFolder], arguments: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """One entry for each pair, backend and position, or why there is none."""
    found = []
    for crt, transformer, published in PAIRS:
        for backend in BACKENDS:
            cell = {"crt_model": crt, "transformer_model": transformer, "backend": backend}
            names = (crt, transformer)
            sides = [side_of(name, places[name], backend, capacity=1024, threads=threads) for name in names]
            try:
                launches = [launches_of(backend, places[name]) for name in names]
                measured = measure_pair(
                    (sides[0], sides[1]),
                    arguments.position or (128, 960),
                    rounds=arguments.rounds,
                    steps=arguments.steps,
                    threads=threads,
                )
            except CrtExportError as error:
                found.append({**cell, "status": "not run", "reason": str(error), "published_ratio": published})
            else:
                entries = [entry_of(steps, published, launches) for steps in measured]
                found += [{**cell, "status": "measured", "reason": "", **entry} for entry in entries]
            say(f"{backend}: {crt} against {transformer}, {found[-1].get('ratio', found[-1]['reason'])}")
    return found


def table_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as a Markdown table; where two figures stand, the first is the CRT's."""
    head = (
        "CRT / transformer", "backend", "tokens in cache", "ms a token", "CRT speed / transformer", "published",
        "advantage", "MB moved a token", "of it cache", "launches",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for entry in entries:
        cells = [f"{entry['crt_model']} / {entry['transformer_model']}", entry["backend"]]
        if entry["status"] != "measured":
            cells += ["", f"not run: {entry['reason'].splitlines()[0]}", "", f"{entry['published_ratio']}"]
            lines.append(f"| {' | '.join([*cells, *[''] * (len(head) - len(cells))])} |")
            continue
        both = (entry["crt"], entry["transformer"])
        cells += [f"{entry['position']}", _two(f"{side['p50_ms']:.2f}" for side in both)]
        cells += [f"**{entry['ratio']:.2f}** [{entry['low']:.2f}, {entry['high']:.2f}]"]
        cells += [f"{entry['published_ratio']}", entry["advantage"]]
        for key in ("total", "cache"):
            cells.append(_two(f"{side['bytes'][key] / 1e6:.1f}" if "bytes" in side else "–" for side in both))
        cells.append(_two("–" if side["launches"] is None else f"{side['launches']}" for side in both))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _two(words: Any) -> str:
    return " / ".join(words)


def reasons_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each measured pair and backend, in a sentence, where the advantage goes and what goes with it."""
    sentences = []
    for entry in entries:
        if entry["status"] != "measured":
            continue
        crt, transformer = entry["crt"], entry["transformer"]
        words = f"{entry['crt_model']}, {entry['backend']}, {entry['position']} tokens: the published "
        words += f"{entry['published_ratio']} {entry['advantage']} at {entry['ratio']:.2f}"
        if "bytes" in crt and "bytes" in transformer:
            moved = transformer["bytes"]["total"] / crt["bytes"]["total"]
            words += f"; by bytes alone it would be {moved:.2f}"
        if crt["launches"] and transformer["launches"]:
            words += f", by launches alone {transformer['launches'] / crt['launches']:.2f}"
        sentences.append(words)
    return sentences


def say(line: str) -> None:
    """Progress goes to the terminal's error stream: the table is the output."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def surroundings() -> dict[str, Any]:
    """When, on what, with what."""
    from crt_export.environment import installed_versions
    from crt_export.machine import machine

    return {
        "format": "crt-export-like-for-like",
        "format_version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": machine(),
        "versions": installed_versions(("crt-export", "torch", "onnx", "onnxruntime", "numpy")),
    }


def main(words: list[str] | None = None) -> int:
    """Measure, print the table, write the file; 1 where a pair could not be measured."""
    from crt_export.machine import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and bundles, made where missing")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    parser.add_argument("--position", type=int, action="append", help="tokens in the cache (128 and 960)")
    parser.add_argument("--rounds", type=int, default=16, help="blocks of each candidate")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a block")
    parser.add_argument("--threads", type=int, help="CPU threads (all)")
    arguments = parser.parse_args(words)
    threads = arguments.threads or int(machine()["cores"])
    presets = [name for pair in PAIRS for name in pair[:2]]
    places = {name: preset_folder(arguments.folder, name, say) for name in presets}
    begin = time.perf_counter()
    entries = compare(places, arguments, threads)
    options = {"threads": threads, "rounds": arguments.rounds, "steps": arguments.steps, "capacity": 1024, "batch": 1}
    words_of = [f"--rounds {arguments.rounds}", f"--steps {arguments.steps}", f"--threads {threads}"]
    words_of += [f"--position {position}" for position in arguments.position or ()]
    command = " ".join(["python validate/benchmarks/like_for_like.py --folder FOLDER", *words_of])
    taken = round(time.perf_counter() - begin, 1)
    result = {**surroundings(), "command": command, "options": options, "seconds": taken, "entries": entries}
    table = table_of(entries)
    sys.stdout.write(table + "\n" + "".join(f"* {sentence}.\n" for sentence in reasons_of(entries)))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    return 0 if all(entry["status"] == "measured" for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
