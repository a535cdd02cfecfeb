"""CRT against a plain transformer on an NVIDIA GPU: ``python validate/device/gpu_bench.py [--output FILE.json]``.

One decode step of the published sizes with random weights, pair by pair in turns: PyTorch eagerly and as a CUDA graph
in BF16 and FP16, ONNX Runtime in FP16 as a CUDA graph where onnxruntime-gpu is installed; at batch 1, 8 and 64 and with
128, 1,024 and 4,096 tokens in the caches. The result is JSON with date, hardware and versions. What cannot run is
listed with its reason; without a GPU that is everything, and the exit code is 3. ``--device cpu`` tries the benchmark
itself: it runs all but the capture.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))

from gpu_candidates import BACKENDS, DTYPES, PAIRS, Candidates, Grid, make_step, models_and_graphs, obstacle
from gpu_rounds import copy_rate, figures_of_pair, kernels_of, run_in_rounds, waiting_for
from static_step import step_cost

RESULT = Path(__file__).resolve().parents[2] / "build" / "gpu_bench.json"
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 24}


def measure(grid: Grid, tell: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """One entry for each pair, dtype, backend, batch and context, measured or with the reason why not."""
    found = []
    for (crt, transformer, published), dtype in itertools.product(grid.pairs, grid.dtypes):
        with models_and_graphs((crt, transformer), dtype, grid.device) as candidates:
            for backend, batch, context in itertools.product(grid.backends, grid.batches, grid.contexts):
                cell = {"pair": [crt, transformer], "published_ratio": published, "dtype": dtype}
                cell |= {"backend": backend, "batch": batch, "context": context}
                reason = obstacle(backend, dtype, grid, context, candidates)
                entry = {"status": "not run", "reason": reason} if reason else _tried(cell, candidates, grid)
                found.append({**cell, **entry})
                tell(line_of(found[-1]))
                gc.collect()
                if grid.device == "cuda":
                    torch.cuda.empty_cache()
    return found


def _tried(cell: Mapping[str, Any], candidates: Candidates, grid: Grid) -> dict[str, Any]:
    """A measured cell, or what the device or the runtime said."""
    try:
        return _measured(cell, candidates, grid)
    except Exception as error:  # ONNX Runtime's own classes share no base; one cell must not cost all the others
        words = str(error).strip().splitlines()
        return {"status": "not run", "reason": f"{type(error).__name__}: {words[0] if words else 'no words'}"}


def _measured(cell: Mapping[str, Any], candidates: Candidates, grid: Grid) -> dict[str, Any]:
    batch, context, backend = cell["batch"], cell["context"], cell["backend"]
    names = cell["pair"]
    first, second = (make_step(backend, *candidates[name], grid=grid, batch=batch, context=context) for name in names)
    wait = waiting_for(grid.device)
    rounds = run_in_rounds(first, second, rounds=grid.rounds, steps=grid.steps, wait=wait)
    entry = {"status": "measured", "reason": "", **figures_of_pair(rounds, batch)}
    for side, name, step in zip(("crt", "transformer"), names, (first, second), strict=True):
        model = candidates[name][0]
        size = model.final_norm.weight.element_size()
        cost = step_cost(model.config, batch=batch, position=context - 1, bytes_per_number=size)
        entry[side] |= {"bytes": {**asdict(cost), "total": cost.total}, "kernels": kernels_of(step) or None}
    return entry


def line_of(entry: Mapping[str, Any]) -> str:
    """A cell as a line of the terminal."""
    head = (
        f"{'/'.join(entry['pair']):28} {entry['backend']:23} {entry['dtype']:5} {entry['batch']:3} {entry['context']:5}"
    )
    if entry["status"] != "measured":
        return f"{head}  not run: {entry['reason']}"
    crt, transformer = entry["crt"]["p50_ms"], entry["transformer"]["p50_ms"]
    interval = f"[{entry['low']:.2f}, {entry['high']:.2f}]"
    return f"{head}  {crt:8.3f} ms {transformer:8.3f} ms  {entry['ratio']:.2f} {interval}"


def result_of(grid: Grid, entries: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The document: when, on what, with what, and what was found."""
    from run import hardware, versions

    from crt_export.machine import machine

    rate = copy_rate(grid.device, _COPIED[grid.device]) if _usable(grid.device) else None
    for entry in entries:
        for side in ("crt", "transformer"):
            if rate and side in entry:
                floor = entry[side]["bytes"]["total"] / rate * 1e3
                entry[side] |= {"floor_ms": round(floor, 4), "over_floor": round(entry[side]["p50_ms"] / floor, 2)}
    return {
        "format": "crt-export-gpu-bench",
        "format_version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": {**machine(), **hardware()},
        "versions": {**versions(), "torch": torch.__version__},
        "options": asdict(grid),
        "copy_gb_s": None if rate is None else round(rate / 1e9, 1),
        "entries": entries,
    }


def say(line: str) -> None:
    """Write a line to the terminal at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _usable(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def grid_from(arguments: argparse.Namespace) -> Grid:
    """The grid that the command line asks for."""
    pairs = [tuple(pair.split(":")) for pair in arguments.pair] or [pair[:2] for pair in PAIRS]
    published = {pair[:2]: pair[2] for pair in PAIRS}
    return Grid(
        device=arguments.device,
        pairs=tuple((crt, transformer, published.get((crt, transformer))) for crt, transformer in pairs),
        backends=tuple(arguments.backend or BACKENDS),
        dtypes=tuple(arguments.dtype or ("bf16", "fp16")),
        batches=tuple(arguments.batch or (1, 8, 64)),
        contexts=tuple(arguments.context or (128, 1024, 4096)),
        rounds=arguments.rounds,
        steps=arguments.steps,
    )


def main(words: list[str] | None = None) -> int:
    """Measure and write the file; 0, or 3 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pair", action="append", default=[], metavar="CRT:TRANSFORMER", help="presets")
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(words)
    grid = grid_from(arguments)
    if not _usable(grid.device):
        sys.stdout.write("not run: PyTorch sees no NVIDIA GPU on this machine\n")
        return 3
    entries = measure(grid, say)
    given = sys.argv[1:] if words is None else words
    result = result_of(grid, entries, " ".join(["python validate/device/gpu_bench.py", *given]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {arguments.output}\n")
    return 0 if any(entry["status"] == "measured" for entry in entries) else 3


if __name__ == "__main__":
    sys.exit(main())
