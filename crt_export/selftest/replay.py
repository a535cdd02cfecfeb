"""The run of a self-test: a bundle opened as a deployment does, its vectors replayed on every target that runs here.

The tokens of the vectors are fed to a session through its public calls only, and what it gives is compared tensor by
tensor, step by step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Literal

import numpy as np

from crt_export.environment import gpus, run_obstacles
from crt_export.errors import BundleError, CrtExportError, InputError, MissingDependencyError, UnsupportedError
from crt_export.progress import Progress, no_progress
from crt_export.runtime import Bundle, load_bundle
from crt_export.runtime.opening import Target
from crt_export.runtime.session import Session
from crt_export.selftest.results import ReplayResult, SelftestReport, TargetResult, TensorResult
from crt_export.selftest.vectors import RECURRENCE, VECTORS_FILE, Vectors, divisor_name, load_vectors, prefill_run

_CACHES = "past_key_values."
#: Steps after a prompt whose result earlier replays have shown to be the vectors': enough to see the state go on.
_FEW_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """How the prompt is fed; steps follow.

    Attributes:
        by: ``step`` (token by token), ``prefill`` (the unrolled graph) or ``prefill_pass`` (as many single passes as
            the prompt has tokens, which is the exact recurrence).
        chunk: Most tokens per call of ``prefill``.
        passes: Those that ``prefill`` was built with; None for a model that is not iterated.
        steps: Steps after the prompt.
    """

    by: Literal["step", "prefill", "prefill_pass"]
    chunk: int
    passes: int | None
    steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """What a session holds after the prompt (index 0) or a step.

    Attributes:
        index: 0 after the prompt, i after step i.
        logits: float32 [vocab].
        next_token: The engine's argmax.
        states: By the name of the graphs' input, float32 [*shape].
        caches: ``past_key_values.{i}.key|value``, [heads, tokens so far, head_dim].
    """

    index: int
    logits: np.ndarray
    next_token: int
    states: Mapping[str, np.ndarray]
    caches: Mapping[str, np.ndarray]


def replay(session: Session, vectors: Vectors, feeding: Feeding) -> Iterator[Observed]:
    """Run a session of one row from its start, looking at it after the prompt and after every step.

    Raises:
        CrtExportError: What prefill(), step() and snapshot() raise.
    """
    ids = vectors.input_ids
    prompt, rest = ids[: vectors.prompt], ids[vectors.prompt : vectors.prompt + feeding.steps]
    logits = np.empty(0)
    if feeding.by == "step":
        for token in prompt:
            logits = session.step([int(token)])
    elif feeding.by == "prefill":
        logits = session.prefill([prompt], chunk=feeding.chunk, passes=feeding.passes)
    else:
        # Chunks need as many passes as they have tokens.
        passes = min(len(prompt), feeding.chunk)
        logits = session.prefill([prompt], chunk=feeding.chunk, passes=passes)
    yield _observed(session, 0, logits)
    for index, token in enumerate(rest, start=1):
        yield _observed(session, index, session.step([int(token)]))


def _observed(session: Session, index: int, logits: np.ndarray) -> Observed:
    tensors = session.snapshot().tensors
    return Observed(
        index=index,
        logits=logits[0],
        next_token=int(tensors["next_tokens"][0]),
        states={name: values[0, 0] for name, values in tensors.items() if name.partition(".")[0] == "state"},
        caches={name: values[0] for name, values in tensors.items() if name.startswith(_CACHES)},
    )


@dataclass
class _Largest:
    """The largest relative error of one tensor so far, and the first one beyond the limit."""

    error: float = 0.0
    where: str = ""
    first: str = ""
    beyond: int = 0


@dataclass(kw_only=True)
class Comparison:
    """Collects the errors of one replay.

    Attributes:
        vectors: All vectors.
        run: Name of the run that the replay must reproduce.
        precision: Precision of the target.
        limit: Largest |difference| over the largest |value| of the vectors.
    """

    vectors: Vectors
    run: str
    precision: str
    limit: float
    _tensors: dict[str, _Largest] = field(default_factory=dict)
    _tokens: list[str] = field(default_factory=list)
    _missing: list[str] = field(default_factory=list)

    def add(self, observed: Observed) -> None:
        """Compare logits, states and next token of one index."""
        index = observed.index
        expected = self.vectors.tensors[f"{self.run}.logits.{index}"]
        where, scale = place(self.vectors, index), self.vectors.scale(self.run, "logits")
        self._compare("logits", observed.logits[self.vectors.columns(index)], expected, scale, where)
        for name, found in observed.states.items():
            states = self.vectors.tensors[f"{self.run}.{name}"]
            self._compare(name, found, states[index], self.vectors.scale(self.run, name), where)
        self._check_token(observed, scale)

    def add_caches(self, observed: Observed) -> None:
        """Compare the caches: one entry per token so far."""
        tokens = self.vectors.prompt + observed.index
        for name, found in observed.caches.items():
            if found.shape[1] != tokens:
                self._missing.append(
                    f"{name} {place(self.vectors, observed.index)} holds {found.shape[1]} tokens, expected {tokens}"
                )
                continue
            expected = self.vectors.tensors[f"{self.run}.{name}"][:, :tokens]
            found = found.astype(np.float32)
            layer, _, kind = name.removeprefix("past_key_values.").partition(".")
            divisors = self.vectors.tensors.get(divisor_name(self.precision, int(layer)))
            if kind == "value" and divisors is not None:
                found *= divisors[:, None]
            with np.errstate(invalid="ignore"):
                position = int(np.abs(found - expected).max(axis=(0, 2)).argmax())
            scale = self.vectors.scale(self.run, name)
            self._compare(name, found, expected, scale, f"at position {position}")

    @property
    def results(self) -> tuple[TensorResult, ...]:
        """The largest error of every tensor."""
        return tuple(
            TensorResult(tensor=name, largest=found.error, where=found.where, limit=self.limit)
            for name, found in self._tensors.items()
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence on every tensor that is off."""
        off = [
            found.first + (f", and {found.beyond - 1} times more, at most {found.error:.3g}" * (found.beyond > 1))
            for found in self._tensors.values()
            if found.beyond
        ]
        return (*off, *self._tokens, *self._missing)

    def _compare(self, name: str, found: np.ndarray, expected: np.ndarray, scale: float, where: str) -> None:
        largest = self._tensors.setdefault(name, _Largest())
        with np.errstate(invalid="ignore"):
            error = float(np.abs(found - expected).max(initial=0.0)) / scale
        if not error <= largest.error:  # NaN too
            largest.error, largest.where = error, where
        if not error <= self.limit:
            largest.beyond += 1
            largest.first = largest.first or (
                f"{name} {where} is off by {error:.3g} of the largest |value| {scale:.3g}, the limit is {self.limit:g}"
            )

    def _check_token(self, observed: Observed, scale: float) -> None:
        index = observed.index
        where = place(self.vectors, index)
        own = int(observed.logits.argmax())
        if observed.next_token != own:
            self._tokens.append(f"next_token {where} is {observed.next_token}, but its own largest logit is {own}'s")
        expected = int(self.vectors.tensors[f"{self.run}.next_tokens"][index])
        margin = float(self.vectors.tensors[f"{self.run}.margins"][index])
        # Two logits that are each within the limit can swap places only where they are as close as this.
        near_tie = 2 * self.limit * scale
        if own != expected and margin > near_tie:
            self._tokens.append(
                f"next_token {where} is {own}, expected {expected}, whose logit leads by {margin:.3g} "
                f"(a lead of {near_tie:.3g} or less is a near tie)"
            )


def place(vectors: Vectors, index: int) -> str:
    """Where in a run an index is."""
    return f"after the prompt of {vectors.prompt} tokens" if index == 0 else f"after step {index}"


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
        raise BundleError(f"{files.path} has no {VECTORS_FILE}; build it again with 'crt-export build' to get one")
    content = files.content(VECTORS_FILE)
    return load_vectors(files.path / VECTORS_FILE, bundle.model, files.manifest["checkpoint"]["sha256"], content)


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
        replays = tuple(_replays(session, bundle.model.carried.iterated, target, vectors))
    off = any(result.failures for result in replays)
    return TargetResult(target=target.name, status="failed" if off else "passed", replays=replays)


def _replays(session: Session, iterated: bool, target: Target, vectors: Vectors) -> list[ReplayResult]:
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
    passes = target.unroll if iterated else None
    by_prefill = Feeding(by="prefill", chunk=chunk, passes=passes, steps=steps)
    plan = [(RECURRENCE, Feeding(by="step", chunk=chunk, passes=passes, steps=steps)), (run, by_prefill)]
    if iterated and not target.profile.compiled and "prefill_pass" in target.graphs:
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
            **{name: (one.states[name], other.states[name]) for name in one.states},
        }
        for name, (before, after) in pairs.items():
            if not np.array_equal(before, after):
                largest = float(np.abs(before.astype(np.float64) - after).max())
                return (
                    f"{name} {place(vectors, one.index)} differs by up to {largest:.3g} from the same tokens before "
                    "reset(), expected the same bits",
                )
    return ()
