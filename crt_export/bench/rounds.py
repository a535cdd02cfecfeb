"""Candidates in rounds: what drifts on a shared machine drifts for all of them alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crt_export.bench.options import CandidatePlan, Plan
from crt_export.bench.report import Quantiles
from crt_export.bench.runner import Passes
from crt_export.bench.worker import PROBE, WorkerProcess
from crt_export.errors import CrtExportError, InputError, UnsupportedError
from crt_export.progress import Progress

_PROBE_SAMPLES = 3
_WARMUPS = 3  # steps before each block that are not counted


@dataclass(kw_only=True)
class Measured:
    """Everything one candidate said, as it came.

    Attributes:
        candidate: The candidate.
        reason: Why it did not run; empty where it did.
        opened: Answer to ``open``: load, memory, info.
        memory: Answer to ``memory``.
        peak_rss: At the end.
        steps: Position to one answer (``seconds``, ``engine``) per round.
        prefill: (Tokens, method) to the seconds of each round.
        refused: Ways of feeding a prompt that it does not have, and why.
    """

    candidate: CandidatePlan
    reason: str = ""
    opened: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    peak_rss: int | None = None
    steps: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    prefill: dict[tuple[int, Passes], list[float]] = field(default_factory=dict)
    refused: dict[Passes, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a run gave: rates of the machine, and every candidate."""

    read_gb_s: Sequence[float]
    gflop_s: Sequence[float]
    measured: Sequence[Measured]


def samples_from_plan(plan: Plan, progress: Progress) -> Samples:
    """Start the candidates, let them run in turns, end them whatever happens.

    Raises:
        CrtExportError: The target, or another one of a bundle, cannot be opened; a PyTorch baseline that cannot is
            ``not run`` instead.
        BenchError: A process died, or failed while it was measured.
    """
    with ExitStack() as processes:
        probe = processes.enter_context(WorkerProcess("the probe", single_threaded_blas=True))
        probe.ask("open", kind=PROBE, threads=plan.threads, bytes=plan.options.probe_bytes)
        everybody = [Measured(candidate=candidate) for candidate in plan.candidates]
        running: list[tuple[Measured, WorkerProcess]] = []
        for number, measured in enumerate(everybody):
            progress(f"opening {measured.candidate.name}", number, len(everybody))
            worker = _opened(plan, measured, processes)
            if worker is not None:
                running.append((measured, worker))
        read, computed = _step_rounds(plan, probe, running, progress)
        _prefill_rounds(plan, running, progress)
        for measured, worker in running:
            measured.peak_rss = worker.ask("peak_rss")
    return Samples(read_gb_s=read, gflop_s=computed, measured=everybody)


def _opened(plan: Plan, measured: Measured, processes: ExitStack) -> WorkerProcess | None:
    """Open a candidate in a new process, alone; None where a baseline cannot run."""
    candidate = measured.candidate
    worker = processes.enter_context(WorkerProcess(candidate.name))
    try:
        measured.opened = worker.ask("open", **candidate.request)
        own, *others = plan.methods
        _try_method(plan, measured, worker, own)
        longest = 0 if own in measured.refused else max(plan.options.prompt_tokens)
        measured.memory = worker.ask("memory", tokens=longest)
        for method in others:
            _try_method(plan, measured, worker, method)
    except CrtExportError as error:
        worker.close()
        if candidate.target is not None:
            raise
        measured.reason = str(error).strip()
        return None
    return worker


def _try_method(plan: Plan, measured: Measured, worker: WorkerProcess, method: Passes) -> None:
    """Find out whether it can feed a prompt this method, which loads what that takes."""
    try:
        worker.ask("prefill", tokens=min(plan.options.prompt_tokens), passes=method)
    except (UnsupportedError, InputError) as error:
        measured.refused[method] = str(error)


def _step_rounds(
    plan: Plan, probe: WorkerProcess, running: Sequence[tuple[Measured, WorkerProcess]], progress: Progress
) -> tuple[list[float], list[float]]:
    read: list[float] = []
    computed: list[float] = []
    options = plan.options
    for number in range(options.rounds):
        progress("steps in turns", number, options.rounds)
        for position in options.positions:
            rates = probe.ask("sample", samples=_PROBE_SAMPLES)
            read += rates["read_gb_s"]
            computed += rates["gflop_s"]
            for measured, worker in _rotated(running, number):
                time.sleep(options.pause_s)
                block = worker.ask("steps", position=position, warmups=_WARMUPS, count=options.steps)
                measured.steps.setdefault(position, []).append(block)
    return read, computed


def _prefill_rounds(plan: Plan, running: Sequence[tuple[Measured, WorkerProcess]], progress: Progress) -> None:
    rounds = plan.options.prefill_rounds
    for place, tokens in enumerate(plan.options.prompt_tokens):
        for number in range(rounds):
            progress("prompts in turns", place * rounds + number, rounds * len(plan.options.prompt_tokens))
            for measured, worker in _rotated(running, number):
                for method in plan.methods:
                    if method in measured.refused:
                        continue
                    time.sleep(plan.options.pause_s)
                    seconds = worker.ask("prefill", tokens=tokens, passes=method)
                    measured.prefill.setdefault((tokens, method), []).append(seconds)


def _rotated(running: Sequence[tuple[Measured, WorkerProcess]], number: int) -> list[tuple[Measured, WorkerProcess]]:
    """Another one begins in every round, so that nobody always follows the same neighbour."""
    first = number % len(running)
    return [*running[first:], *running[:first]]


RESAMPLES = 2000
SEED = 20_260_627


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and the ends of its 95 % interval."""

    median: float
    low: float
    high: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """10th, 50th and 90th percentile of at least one sample, with the samples themselves."""
    p10, p50, p90 = np.percentile(np.asarray(samples, np.float64), (10, 50, 90)).tolist()
    return Quantiles(p10=p10, p50=p50, p90=p90, samples=tuple(float(sample) for sample in samples))


def paired_ratio(of: Sequence[Sequence[float]], against: Sequence[Sequence[float]]) -> Interval:
    """How many times longer ``against`` took than ``of``, round by round, so that a machine's drift cancels.

    Args:
        of: Per round the times of the candidate that is judged, any unit.
        against: Per round those of the other one.

    Returns:
        The median of the rounds' ratios of medians. Its interval is a percentile bootstrap over rounds
        (``RESAMPLES`` resamples, a fixed seed), which says how much the rounds differ, not what another day gives.
    """
    ratios = np.array([np.median(b) / np.median(a) for a, b in zip(of, against, strict=True)], np.float64)
    drawn = np.random.default_rng(SEED).integers(ratios.size, size=(RESAMPLES, ratios.size))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5)).tolist()
    return Interval(median=float(np.median(ratios)), low=low, high=high)
