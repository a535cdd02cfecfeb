"""Run the self-test: open the bundle as a deployment does, replay its vectors on every target that runs here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from crt_export.environment import gpus, run_obstacles
from crt_export.errors import BundleError, CrtExportError, InputError, MissingDependencyError, UnsupportedError
from crt_export.progress import Progress, no_progress
from crt_export.runtime import Bundle, load_bundle
from crt_export.runtime.opening import Target
from crt_export.runtime.session import Session
from crt_export.selftest.compare import Comparison, place
from crt_export.selftest.replay import Feeding, Observed, replay
from crt_export.selftest.report import ReplayResult, SelftestReport, TargetResult
from crt_export.selftest.vectors import RECURRENCE, VECTORS_FILE, Vectors, load_vectors, prefill_run

#: Steps after a prompt whose result earlier replays have shown to be the vectors': enough to see the state go on.
_FEW_STEPS = 2


def run_selftest(
    path: str | os.PathLike[str], targets: Sequence[str] = (), *, progress: Progress = no_progress
) -> SelftestReport:
    """Replay the vectors of a bundle on this machine.

    A bundle whose agreement with PyTorch was never shown may be given: the self-test tells whether this machine
    computes what PyTorch computed for a few tokens, no more, and the report says that it is unvalidated.

    Args:
        path: The bundle.
        targets: Names of targets that must run; empty: all that run here.
        progress: Told which target is being replayed.

    Returns:
        The report, whether it passed or not.

    Raises:
        BundleError: The bundle or its vectors are missing, damaged or too new, or it was built without vectors.
        InputError: An unknown target.
    """
    with load_bundle(path, allow_unvalidated=True) as bundle:
        unknown = [name for name in targets if name not in bundle.targets]
        if unknown:
            known = ", ".join(bundle.targets) or "(none)"
            raise InputError(f"unknown target {', '.join(map(repr, unknown))}: {path} was built for {known}")
        vectors = vectors_of_bundle(bundle)
        chosen = [name for name in bundle.targets if not targets or name in targets]
        results = []
        for done, name in enumerate(chosen):
            progress(f"replay {name}", done, len(chosen))
            results.append(_target_result(bundle, bundle.target(name), vectors))
        return SelftestReport(
            bundle=bundle.files.identity,
            validated=bundle.manifest["validated"],
            vectors=vectors.metadata,
            targets=tuple(results),
            asked=tuple(targets),
        )


def vectors_of_bundle(bundle: Bundle) -> Vectors:
    """The checked vectors of an open bundle.

    Raises:
        BundleError: It has none, or they are damaged, too new, or not this model's.
    """
    files = bundle.files
    if VECTORS_FILE not in files:
        raise BundleError(
            f"{files.path} has no {VECTORS_FILE}: it was built by a version without self-test; build it again with "
            "'crt-export build' to get one"
        )
    content = files.content(VECTORS_FILE)
    return load_vectors(files.path / VECTORS_FILE, bundle.config, files.manifest["checkpoint"]["sha256"], content)


def _target_result(bundle: Bundle, target: Target, vectors: Vectors) -> TargetResult:
    if not target.runs_here:
        reason = "; ".join(run_obstacles(target.profile, gpus()))
        return TargetResult(target=target.name, status="not run", reason=reason)
    try:
        # As large as the vectors need, as an application would; a compiled engine has one capacity.
        tokens = len(vectors.input_ids)
        session = bundle.session(target.name, capacity=None if target.profile.compiled else tokens)
    except (MissingDependencyError, UnsupportedError) as error:
        return TargetResult(target=target.name, status="not run", reason=str(error))
    except BundleError:
        raise
    except CrtExportError as error:
        opening = ReplayResult(replay="open", tensors=(), failures=(str(error),))
        return TargetResult(target=target.name, status="failed", replays=(opening,))
    with session:
        replays = tuple(_replays(session, bundle.config.recurrent, target, vectors))
    off = any(result.failures for result in replays)
    return TargetResult(target=target.name, status="failed" if off else "passed", replays=replays)


def _replays(session: Session, recurrent: bool, target: Target, vectors: Vectors) -> list[ReplayResult]:
    """Every replay on one session, with a reset between: what it carries across shows in the next one."""
    limit = vectors.limits.get(target.profile.precision)
    if limit is None:
        raise BundleError(f"the self-test vectors have no limit for {target.profile.precision} of {target.name}")
    chunk, steps = min(vectors.prompt, target.profile.seq.max), vectors.steps
    run = prefill_run(target.unroll or 1, chunk)
    if run not in vectors.runs:
        raise BundleError(
            f"the self-test vectors have no run {run!r} for {target.name}, only {', '.join(vectors.runs)}; "
            "build the bundle again"
        )
    passes = target.unroll if recurrent else None
    by_prefill = Feeding(by="prefill", chunk=chunk, passes=passes, steps=steps)
    plan = [(RECURRENCE, Feeding(by="step", chunk=chunk, passes=passes, steps=steps)), (run, by_prefill)]
    if recurrent and not target.profile.compiled and "prefill_pass" in target.graphs:
        plan.append((RECURRENCE, replace(by_prefill, by="prefill_pass", steps=min(steps, _FEW_STEPS))))
    results, seen = [], []
    for name, feeding in plan:
        comparison = Comparison(vectors=vectors, run=name, precision=target.profile.precision, limit=limit)
        observed, failure = _observe(session, vectors, feeding, comparison)
        if feeding is by_prefill:
            seen = observed
        failures = (*comparison.failures, *failure)
        results.append(ReplayResult(replay=feeding.by, tensors=comparison.results, failures=failures))
        session.reset()
    again = replace(by_prefill, steps=min(steps, _FEW_STEPS))
    repeated, failure = _observe(session, vectors, again, None)
    differences = _differences(vectors, seen[: again.steps + 1], repeated)
    results.append(ReplayResult(replay="reset", tensors=(), failures=(*differences, *failure)))
    return results


def _observe(
    session: Session, vectors: Vectors, feeding: Feeding, comparison: Comparison | None
) -> tuple[list[Observed], tuple[str, ...]]:
    """Run one replay; what it gave, and how it failed if it did."""
    observed: list[Observed] = []
    try:
        for one in replay(session, vectors, feeding):
            if comparison is not None:
                comparison.add(one)
            observed.append(one)
    except BundleError:  # a graph that is loaded on demand differs from what was built
        raise
    except CrtExportError as error:
        return observed, (f"failed {place(vectors, len(observed)).replace('after', 'at', 1)}: {error}",)
    if comparison is not None:
        comparison.add_caches(observed[-1])
    return observed, ()


def _differences(vectors: Vectors, first: Sequence[Observed], again: Sequence[Observed]) -> tuple[str, ...]:
    """The first tensor that has other bits after reset() than before; nothing where all are equal."""
    for one, other in zip_longest(first, again):
        if one is None or other is None:
            break  # a replay failed, which its own sentence says
        pairs = {
            "logits": (one.logits, other.logits),
            **{name: (one.caches[name], other.caches[name]) for name in one.caches},
        }
        if one.state is not None and other.state is not None:
            pairs["state"] = (one.state, other.state)
        for name, (before, after) in pairs.items():
            if not np.array_equal(before, after):
                largest = float(np.abs(before.astype(np.float64) - after).max())
                return (
                    f"{name} {place(vectors, one.index)} differs by up to {largest:.3g} from the same tokens before "
                    "reset(), expected the same bits",
                )
    return ()
