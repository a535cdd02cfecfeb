"""Two steps timed in turns on one device, so that what changes on the machine changes for both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from crt_export.bench.rounds import paired_ratio

Step = Callable[[], None]
Rounds = list[tuple[list[float], list[float]]]


def run_in_rounds(first: Step, second: Step, *, rounds: int, steps: int, wait: Step, warmups: int = 3) -> Rounds:
    """Seconds of each step, of the first and the second, round by round.

    Args:
        first: Decodes one token.
        second: Likewise; it begins every second round.
        rounds: Blocks of each.
        steps: Timed steps of a block, after ``warmups``.
        wait: Returns when the device is done; a step is timed until then, as a reader of its token waits.
        warmups: Steps of a block that are not timed.
    """
    taken: Rounds = []
    for number in range(rounds):
        order = (first, second) if number % 2 == 0 else (second, first)
        blocks = {id(step): _block(step, steps, warmups, wait) for step in order}
        taken.append((blocks[id(first)], blocks[id(second)]))
    return taken


def _block(step: Step, steps: int, warmups: int, wait: Step) -> list[float]:
    for _ in range(warmups):
        step()
    wait()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - begin)
    return seconds


def step_figures(samples: Sequence[float], batch: int) -> dict[str, float]:
    """Percentiles in milliseconds and tokens per second of timed steps."""
    p10, p50, p90, p99 = (float(value) * 1e3 for value in np.percentile(samples, [10, 50, 90, 99]))
    rate = batch / float(np.mean(samples))
    figures = {"p10_ms": p10, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "tokens_per_s": rate}
    return {"samples": len(samples), **{name: float(f"{value:.4g}") for name, value in figures.items()}}


def copy_rate(device: str, size: int, samples: int = 20) -> float:
    """Bytes read and written per second by a copy on the device: the median, and the first copy left out.

    Args:
        device: ``cuda`` or ``cpu``.
        size: Bytes of the array, far beyond the device's caches.
        samples: Copies that are timed.
    """
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    wait = waiting_for(device)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / float(np.median(_block(copy, samples, 1, wait)))


def waiting_for(device: str) -> Step:
    """What returns when the device is done with all it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def kernels_of(step: Step) -> int:
    """Kernels, copies and fills that a step launches on the GPU; 0 where it launches none."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return 0
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum("CUDA" in str(event.device_type) for event in found.events() or ())


def figures_of_pair(rounds: Rounds, batch: int) -> dict[str, Any]:
    """Figures of both, and how many times longer the second took than the first, round by round."""
    first, second = ([seconds for times in rounds for seconds in times[side]] for side in (0, 1))
    ratio = paired_ratio([times[0] for times in rounds], [times[1] for times in rounds])
    values = {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
    return {
        "crt": step_figures(first, batch),
        "transformer": step_figures(second, batch),
        **{name: float(f"{value:.4g}") for name, value in values.items()},
        "rounds": len(rounds),
    }
