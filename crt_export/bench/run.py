"""The benchmark, from a bundle and options to a report: the file to read first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crt_export import __version__
from crt_export.bench.options import BenchOptions, CandidatePlan, Plan, plan_from_options
from crt_export.bench.report import (
    MEASURED,
    NOT_RUN,
    Bandwidth,
    BenchReport,
    Candidate,
    Compute,
    Load,
    Memory,
    ModelSize,
    PrefillFigures,
    Ratio,
    StepFigures,
)
from crt_export.bench.rounds import Measured, Samples, paired_ratio, quantiles, samples_from_plan
from crt_export.bench.runner import Passes
from crt_export.bench.step_cost import step_bytes, step_flops, weights_from_graph
from crt_export.bundle import BundleFiles
from crt_export.environment import installed_versions
from crt_export.machine import machine
from crt_export.models.declaration import ModelInfo
from crt_export.progress import Progress, no_progress

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")
_FLOAT_BYTES = {"float32": 4, "float16": 2}
_STEP, _PREFILL = "step", "prefill"


def run_bench(
    bundle: str | Path,
    options: BenchOptions | None = None,
    *,
    created: str = "",
    command: str = "",
    progress: Progress = no_progress,
) -> BenchReport:
    """Measure a target of a bundle, and what it is compared with, in turns.

    Args:
        bundle: The bundle's folder; an unvalidated one is measured too, with a note.
        options: What is measured; the defaults take the first target that runs here, alone.
        created: When, for the report.
        command: The command that repeats it, for the report.
        progress: Told how far it is.

    Raises:
        BundleError: The bundle cannot be opened.
        InputError: Something asked for is unknown or impossible.
        MissingDependencyError: The target's runtime is not installed.
        BenchError: A process died, or failed while it was measured.
    """
    plan = plan_from_options(Path(bundle), options or BenchOptions())
    samples = samples_from_plan(plan, progress)
    return report_from_samples(plan, samples, created=created, command=command)


def report_from_samples(plan: Plan, samples: Samples, *, created: str, command: str) -> BenchReport:
    """The report of a run."""
    on_cpu = plan.target.profile.device == "cpu"
    bandwidth = Bandwidth(threads=plan.threads, bytes=plan.options.probe_bytes, read_gb_s=quantiles(samples.read_gb_s))
    compute = Compute(threads=plan.threads, gflop_s=quantiles(samples.gflop_s))
    return BenchReport(
        created=created,
        command=command,
        crt_export=__version__,
        hardware=machine(),
        versions=installed_versions(_PACKAGES),
        bundle=_bundle(plan.files),
        model=_model(plan.files.path.name, plan.files, plan.model),
        options=_options(plan),
        bandwidth=bandwidth if on_cpu else None,
        compute=compute if on_cpu else None,
        candidates=tuple(_candidate(plan, measured, bandwidth, compute) for measured in samples.measured),
        ratios=tuple(_ratios(samples.measured)),
        notes=tuple(dict.fromkeys(_notes(plan, samples.measured))),
    )


def _candidate(plan: Plan, measured: Measured, bandwidth: Bandwidth, compute: Compute) -> Candidate:
    candidate = measured.candidate
    other = candidate.files.path != plan.files.path
    model = _model(candidate.name, candidate.files, candidate.model) if other else None
    if measured.reason:
        return Candidate(name=candidate.name, kind=candidate.kind, status=NOT_RUN, reason=measured.reason, model=model)
    steps = [_step(plan, measured, position, bandwidth, compute) for position in plan.options.positions]
    prefill = [_prefill(candidate, tokens, method, seconds) for (tokens, method), seconds in measured.prefill.items()]
    return Candidate(
        name=candidate.name,
        kind=candidate.kind,
        status=MEASURED,
        model=model,
        load=Load(**measured.opened["load"]),
        step=tuple(steps),
        prefill=tuple(prefill),
        memory=Memory(
            weight_file=measured.opened["info"]["weight_file"],
            peak_rss=measured.peak_rss,
            **measured.opened["memory"],
            **measured.memory,
        ),
    )


def _step(plan: Plan, measured: Measured, position: int, bandwidth: Bandwidth, compute: Compute) -> StepFigures:
    blocks = measured.steps[position]
    seconds = np.concatenate([block["seconds"] for block in blocks])
    engine = np.concatenate([block["engine"] for block in blocks])
    p10, p50, p90, p99 = (np.percentile(seconds, (10, 50, 90, 99)) * 1e3).tolist()
    return StepFigures(
        position=position,
        batch=plan.options.batch,
        samples=seconds.size,
        p10_ms=p10,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        max_ms=float(seconds.max() * 1e3),
        mean_ms=float(seconds.mean() * 1e3),
        tokens_per_s=float(plan.options.batch / seconds.mean()),
        runtime_overhead=float(np.median(1 - engine / seconds)) if engine.size else None,
        **_floor(plan, measured, position + plan.options.steps // 2, p50, bandwidth, compute),  # the middle of a block
    )


def _floor(
    plan: Plan, measured: Measured, position: int, p50_ms: float, bandwidth: Bandwidth, compute: Compute
) -> dict[str, Any]:
    """What memory and arithmetic allow at best; a GPU's own rates are not known here."""
    candidate, batch = measured.candidate, plan.options.batch
    model, target = candidate.model, candidate.target
    weights = measured.opened["info"]["weights"]
    if weights is None or candidate.step is None:
        return {}
    item = _FLOAT_BYTES["float32" if target is None else target.cache_dtype]
    moved = step_bytes(model, weights=weights, position=position, batch=batch, cache_item_bytes=item)
    multiplied = weights_from_graph(candidate.step).multiplied
    flops = step_flops(model.carried, multiplied=multiplied, position=position, batch=batch)
    if target is not None and target.profile.device != "cpu":
        return {"bytes": moved, "flops": flops}
    floor = moved.total / bandwidth.read_gb_s.p90 / 1e6
    return {
        "bytes": moved,
        "flops": flops,
        "floor_ms": floor,
        "compute_floor_ms": flops / compute.gflop_s.p90 / 1e6,
        "over_floor": p50_ms / floor,
        "over_floor_paired": p50_ms / (moved.total / bandwidth.read_gb_s.p50 / 1e6),
    }


def _prefill(candidate: CandidatePlan, tokens: int, method: Passes, seconds: Sequence[float]) -> PrefillFigures:
    name, passes = ("passes", method) if isinstance(method, int) else (method or "default", None)
    chunk = None
    if method is None and candidate.target is not None:
        plan = candidate.files.manifest["targets"][candidate.target.name]["prefill"]
        passes, chunk = plan["passes"], plan["chunk"]
    elif method is None and candidate.model.carried.iterated:
        passes = candidate.model.carried.passes
    return PrefillFigures(
        tokens=tokens,
        method=name,
        passes=passes,
        chunk=chunk,
        samples=len(seconds),
        p50_s=float(np.median(seconds)),
        p90_s=float(np.percentile(seconds, 90)),
    )


def _ratios(everybody: Sequence[Measured]) -> Iterator[Ratio]:
    """The target against everybody else, at every position and for every length of prompt."""
    first, *others = everybody
    for other in others:
        for position, blocks in other.steps.items():
            own = [block["seconds"] for block in first.steps[position]]
            yield _ratio(first, other, _STEP, position, own, [block["seconds"] for block in blocks])
        for (tokens, method), seconds in other.prefill.items():
            if method is None and (tokens, method) in first.prefill:
                own = [[taken] for taken in first.prefill[tokens, method]]
                yield _ratio(first, other, _PREFILL, tokens, own, [[taken] for taken in seconds])


def _ratio(
    of: Measured, against: Measured, what: str, at: int, own: Sequence[Sequence[float]], its: Sequence[Sequence[float]]
) -> Ratio:
    found = paired_ratio(own, its)
    return Ratio(
        of=of.candidate.name,
        against=against.candidate.name,
        what=what,
        at=at,
        ratio=found.median,
        low=found.low,
        high=found.high,
        rounds=len(own),
    )


def _notes(plan: Plan, everybody: Sequence[Measured]) -> Iterator[str]:
    yield f"prompts are {'' if not plan.text.ids else 'the beginning of '}{plan.text.source}"
    for measured in everybody:
        name = measured.candidate.name
        if measured.reason:
            continue
        yield from measured.opened["info"]["notes"]
        for method, reason in measured.refused.items():
            yield f"{name} takes no prompt {'of its own' if method is None else f'with passes={method}'}: {reason}"
        share = measured.opened["load"]["cached_share"]
        if share is not None:
            yield f"{name} was opened with {share:.0%} of its weight file in the page cache"
    if plan.target.profile.precision.startswith("w8"):
        yield "the compute floor is that of float32 products; integer ones can be faster"


def _options(plan: Plan) -> dict[str, Any]:
    """Every option of the run as JSON has it; the text by what it is called, not where it lay."""
    tokens = plan.options.tokens
    return {**vars(plan.options), "text": plan.text.source, "tokens": None if tokens is None else str(tokens)}


def _bundle(files: BundleFiles) -> dict[str, Any]:
    manifest: Mapping[str, Any] = files.manifest
    return {
        "name": files.path.name,
        "sha256": files.identity,
        "validated": manifest["validated"],
        "targets": {name: {"prefill": target.get("prefill")} for name, target in manifest["targets"].items()},
    }


def _model(name: str, files: BundleFiles, model: ModelInfo) -> ModelSize:
    return ModelSize(
        name=name,
        model_type=model.model_type,
        hidden_size=model.hidden_size,
        caches=len(model.carried.caches),
        vocab_size=model.vocab_size,
        parameters=files.manifest["checkpoint"].get("parameters"),
    )
