"""Two candidates that decode in turns, each in a process of its own, the memory's read rate sampled between them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crt_export.bench.report import StepBytes
from crt_export.bench.rounds import Interval, paired_ratio, quantiles
from crt_export.bench.step_cost import step_bytes
from crt_export.bench.worker import WorkerProcess
from crt_export.models.declaration import ModelInfo

#: Far beyond the caches.
PROBED_BYTES = 256 << 20
_PAUSE = 0.05  # until the threads of the one before have stopped spinning


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two.

    Attributes:
        name: For messages.
        request: What its worker is told to open.
        model: Its model.
    """

    name: str
    request: Mapping[str, Any]
    model: ModelInfo


@dataclass(frozen=True, kw_only=True)
class PairedSteps:
    """What was measured at one position, times in seconds, round by round.

    Attributes:
        position: Tokens in the cache before the first timed step of a block.
        first: Of the first candidate.
        second: Of the second.
        read_gb_s: Rates of the probe.
        bytes: What a step of each has to move; None where its weights are unknown.
    """

    position: int
    first: Sequence[Sequence[float]]
    second: Sequence[Sequence[float]]
    read_gb_s: Sequence[float]
    bytes: tuple[StepBytes | None, StepBytes | None]

    @property
    def ratio(self) -> Interval:
        """How many times longer the second takes: the speed of the first over that of the second."""
        return paired_ratio(self.first, self.second)


def measure_pair(
    sides: tuple[Side, Side], positions: Sequence[int], *, rounds: int, steps: int, threads: int
) -> list[PairedSteps]:
    """Open both, then at each position let them decode in turns; which begins alternates.

    Args:
        sides: The candidates.
        positions: Tokens in the cache.
        rounds: Blocks of each.
        steps: Timed steps of a block, after three warm-ups.
        threads: Of the probe.

    Raises:
        CrtExportError: A candidate cannot be opened, or its process died.
    """
    with ExitStack() as stack:
        probe = stack.enter_context(WorkerProcess("the probe of bandwidth", single_threaded_blas=True))
        probe.ask("open", kind="probe", threads=threads, bytes=PROBED_BYTES)
        workers = [stack.enter_context(WorkerProcess(side.name)) for side in sides]
        facts = [worker.ask("open", **side.request)["info"] for worker, side in zip(workers, sides, strict=True)]
        found = []
        for position in positions:
            times: tuple[list[list[float]], list[list[float]]] = ([], [])
            rates: list[float] = []
            for worker in workers:  # the caches are filled up to the position, and torch.compile compiles
                worker.ask("steps", position=position, warmups=3, count=1)
            for number in range(rounds):
                rates += probe.ask("sample", samples=1)["read_gb_s"]
                for index in (0, 1) if number % 2 == 0 else (1, 0):
                    time.sleep(_PAUSE)
                    answer = workers[index].ask("steps", position=position, warmups=3, count=steps)
                    times[index].append(answer["seconds"])
            costs = [_bytes(side.model, fact["weights"], position) for side, fact in zip(sides, facts, strict=True)]
            found.append(
                PairedSteps(
                    position=position,
                    first=times[0],
                    second=times[1],
                    read_gb_s=rates,
                    bytes=(costs[0], costs[1]),
                )
            )
        return found


def side_figures(blocks: Sequence[Sequence[float]], cost: StepBytes | None, rates: Sequence[float]) -> dict[str, Any]:
    """Percentiles of one candidate's steps, and how far the median is from the floor that the memory's rate sets."""
    milliseconds = 1e3 * np.concatenate([np.asarray(block) for block in blocks])
    p10, p50, p90 = np.percentile(milliseconds, [10, 50, 90]).tolist()
    figures: dict[str, Any] = {"samples": milliseconds.size}
    figures |= {"p10_ms": _short(p10), "p50_ms": _short(p50), "p90_ms": _short(p90)}
    figures |= {"tokens_per_s": _short(1e3 / float(milliseconds.mean()))}
    if cost is not None:
        floor = cost.total / quantiles(rates).p90 / 1e6
        figures |= {"bytes": asdict(cost)}
        figures |= {"floor_ms": _short(floor), "over_floor": _short(p50 / floor)}
    return figures


def _bytes(model: ModelInfo, weights: int | None, position: int) -> StepBytes | None:
    if weights is None:
        return None
    return step_bytes(model, weights=weights, position=position, batch=1, cache_item_bytes=4)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
