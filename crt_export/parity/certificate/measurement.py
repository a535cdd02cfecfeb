"""Measurement of both regimes: a few numbers per token of each run, never all logits.

Likelihoods are float64 throughout. A float32 log-softmax is right to about 1e-6 of a nat per token (2^-24 of sums near
10), with a bias that a mean does not remove; FP32's gaps are that small, and the float64 form costs little beside the
passes themselves. Both regimes' logits come through the same head, so that their difference is that of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crt_export.config import ModelConfig
from crt_export.parity.certificate.runs import Chain, Run
from crt_export.parity.comparison import trained_ranges
from crt_export.parity.runner import Runner
from crt_export.parity.scores import BLOCK_ELEMENTS, divergence
from crt_export.parity.setup import ParitySetup
from crt_export.parity.windows import Windows
from crt_export.text import fill_unscored

#: Multiply-accumulates that all passes may take, a minute or two on one core; beyond it windows are left out.
MOST_WORK = 1_600_000_000_000
_FEWEST_WINDOWS = 2
#: What a logit's share of a float64 softmax takes, in multiply-accumulates of the passes.
_WORK_PER_LOGIT = 150
#: Memory of the iterates, caches and scores of the windows that run together.
_BATCH_BYTES = 256 * 2**20
#: Told, per batch of windows, what the chain gave and [passes, windows, ...] of the iterates and residuals.
Observer = Callable[[slice, Chain, np.ndarray, np.ndarray], None]


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Decoding from K passes over the first ``start`` tokens up to ``stop``; gated below the training length."""

    start: int
    stop: int
    gated: bool


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Extent of one certificate.

    Attributes:
        unroll: K of the target's prefill.
        trained: Training length in tokens; None is not known.
        windows: How many of the windows are run.
        length: Tokens per window.
        whole: Whether these are the whole windows that were asked for, and all of them; the limits hold for those.
        passes: Numbers of passes that are compared with the recurrence.
        selected: Those that are handed over from.
        spans: Positions below and above the training length.
        handovers: Where decoding takes over.
        anchors: Tokens of the exactness anchors.
        batch: Windows that run together.
        notes: Sentences on what was left out, and why.
    """

    unroll: int
    trained: int | None
    windows: int
    length: int
    whole: bool
    passes: tuple[int, ...]
    selected: tuple[int, ...]
    spans: tuple[slice, ...]
    handovers: tuple[Handover, ...]
    anchors: tuple[int, ...]
    batch: int
    notes: tuple[str, ...] = ()

    def gated(self, span: slice) -> bool:
        """Whether a span lies below the training length, where the model answers for its two regimes."""
        return self.trained is None or span.stop <= self.trained

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of the position buckets: powers of two, the training length and both ends."""
        powers = {2**power for power in range(self.length.bit_length()) if 2**power < self.length}
        trained = {self.trained} if self.trained is not None and self.trained < self.length else set()
        return tuple(sorted({0, self.length} | powers | trained))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The windows in batches."""
        return tuple(
            slice(start, min(start + self.batch, self.windows)) for start in range(0, self.windows, self.batch)
        )


def coverage_of(runner: Runner, setup: ParitySetup, longest: int) -> Coverage:
    """What is run for a target; the same for every target with the same K.

    Args:
        runner: The target.
        setup: Windows and options.
        longest: Most tokens that the target takes at once.
    """
    config, windows, unroll = setup.config, setup.windows, runner.target.unroll or 1
    passes = tuple(range(1, 2 * unroll + 1))
    length = min(windows.length, longest)
    count = _windows_within_work(config, windows, 2 * unroll)
    notes = []
    if length < windows.length:
        notes.append(
            f"certificate: the first {length} of the {windows.length} tokens of every window, which "
            f"{runner.target.name} takes at once; likelihoods are reported and not gated, their limits are for whole "
            "windows"
        )
    if count < windows.count:
        notes.append(
            f"certificate: {count} of {windows.count} windows, because {2 * unroll} passes of "
            f"{config.parameter_count:,} parameters over all of them take too long; likelihoods are reported and not "
            "gated, their limits are for all windows"
        )
    trained = config.training_sequence_length
    selected = {1 << power for power in range(passes[-1].bit_length())} | {unroll, 2 * unroll}
    # Caches of the chain, of the passes and of the handover, and an iterate of every pass.
    iterates = 4 * (len(passes) + 2) * length * config.hidden_size
    bytes_each = 2 * runner.cache_bytes(length) + runner.prefill_bytes(length) + iterates
    return Coverage(
        unroll=unroll,
        trained=trained,
        windows=count,
        length=length,
        whole=(count, length) == (windows.count, windows.length),
        passes=passes,
        selected=tuple(sorted(selected & set(passes))),
        spans=tuple(trained_ranges(length, trained)),
        handovers=_handovers(length, trained),
        anchors=tuple(sorted({min(tokens, length) for tokens in (1, 2, unroll, 2 * unroll)})),
        batch=max(1, min(setup.options.window_batch, count, _BATCH_BYTES // bytes_each)),
        notes=tuple(notes),
    )


def _windows_within_work(config: ModelConfig, windows: Windows, passes: int) -> int:
    per_token = config.parameter_count + _WORK_PER_LOGIT * config.vocab_size
    work = per_token * windows.length * passes
    return min(windows.count, max(_FEWEST_WINDOWS, MOST_WORK // work))


def _handovers(length: int, trained: int | None) -> tuple[Handover, ...]:
    """In the middle of what lies below the training length, and in the middle of the window where that is above."""
    below = length if trained is None else min(length, trained)
    found = [Handover(start=below // 2, stop=below, gated=True)] if below > 1 else []
    if below < length:  # a window has two tokens at least, so there always is one
        found.append(Handover(start=length // 2, stop=length, gated=False))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """Decoding from K passes, per selected number of passes.

    Attributes:
        handover: From where to where.
        nll: Negative log-likelihood of the next token, nats, float64 [passes, windows, positions].
        kl: Divergence of the recurrence's distribution from this one, nats, same shape.
        state_error: Largest |h - h of the recurrence| over its largest |value|, float64 [passes].
    """

    handover: Handover
    nll: np.ndarray
    kl: np.ndarray
    state_error: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """One run's regimes on the same windows.

    Attributes:
        sequential_nll: Negative log-likelihood in the recurrence, nats, float64 [windows, positions].
        nll: After K passes, float64 [passes, windows, positions].
        kl: Divergence of the recurrence's distribution from that of K passes, nats, same shape.
        residual: Largest |change of h| in the last pass, float64 [passes, windows].
        error: Largest |h - h of the recurrence| after K passes, float64 [passes, windows].
        prefix_error: The same over the first K positions only and over the largest |h|, float64 [passes].
        continuations: One per handover.
    """

    sequential_nll: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    residual: np.ndarray
    error: np.ndarray
    prefix_error: np.ndarray
    continuations: tuple[Continuation, ...]


def measure(
    run: Run, coverage: Coverage, setup: ParitySetup, label: str, observe: Observer | None = None
) -> Measurement:
    """Run everything.

    Args:
        run: Of the target or the reference.
        coverage: What to run.
        setup: Its windows say the token after each one.
        label: What is told to run.
        observe: Sees the states of every batch of windows.

    Raises:
        ContractError: A graph failed, or delivered NaN or infinity.
    """
    setup.progress(label, 0, coverage.windows)
    parts = []
    for rows in coverage.slices:
        parts.append(_measure_rows(run, coverage, rows, setup.windows.targets[rows, : coverage.length], observe))
        setup.progress(label, rows.stop, coverage.windows)
    return Measurement(
        sequential_nll=np.concatenate([part.sequential_nll for part in parts]),
        **_joined(parts, ("nll", "kl", "residual", "error"), ("prefix_error",)),
        continuations=tuple(
            Continuation(handover=same[0].handover, **_joined(same, ("nll", "kl"), ("state_error",)))
            for same in zip(*(part.continuations for part in parts), strict=True)
        ),
    )


def _joined(parts: Sequence[Any], by_window: Sequence[str], largest: Sequence[str]) -> dict[str, np.ndarray]:
    """Batches of windows as one: arrays [passes, windows, ...] side by side, and of others the largest."""
    whole = {name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in by_window}
    return whole | {name: np.max([getattr(part, name) for part in parts], axis=0) for name in largest}


def compare_states(
    run: Run, sequential: np.ndarray, found: np.ndarray | Sequence[np.ndarray], targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likelihoods and divergences of several states against those of the recurrence, piece by piece.

    Args:
        run: Its head makes logits of states.
        sequential: h of the recurrence, float32 [windows, positions, hidden].
        found: Other h of the same tokens.
        targets: The token after each one, int64 [windows, positions].

    Returns:
        Negative log-likelihood of the recurrence [windows, positions], of the others and their divergence
        [found, windows, positions]; nats, float64.
    """
    nll = np.empty((1 + len(found), *targets.shape))
    kl = np.empty((len(found), *targets.shape))
    wanted = torch.from_numpy(targets).clamp(min=0).unsqueeze(-1)
    size = max(1, BLOCK_ELEMENTS // (len(targets) * run.vocab))
    for first in range(0, targets.shape[1], size):
        piece = slice(first, first + size)
        own = torch.from_numpy(run.head(sequential[:, piece])).double()
        expected = torch.log_softmax(own, dim=-1)
        nll[0, :, piece] = -expected.gather(-1, wanted[:, piece]).squeeze(-1).numpy()
        for index, states in enumerate(found):
            logits = torch.from_numpy(run.head(states[:, piece])).double()
            after = torch.log_softmax(logits, dim=-1)
            nll[1 + index, :, piece] = -after.gather(-1, wanted[:, piece]).squeeze(-1).numpy()
            kl[index, :, piece] = divergence(expected, after, logits.sub_(own)).numpy()
    nll = fill_unscored(nll, targets)
    return nll[0], nll[1:], kl


def _measure_rows(
    run: Run, coverage: Coverage, rows: slice, targets: np.ndarray, observe: Observer | None
) -> Measurement:
    chain = run.chain(rows)
    states, residual = run.passes(rows, coverage.passes[-1])
    scale = _largest(chain.hidden)
    errors = [np.abs(after - chain.hidden).max(axis=-1) for after in states]
    sequential_nll, nll, kl = compare_states(run, chain.hidden, states, targets)
    if observe is not None:
        observe(rows, chain, states, residual)
    return Measurement(
        sequential_nll=sequential_nll,
        nll=nll,
        kl=kl,
        residual=residual.astype(np.float64),
        error=np.stack([error.max(axis=-1) for error in errors]).astype(np.float64),
        prefix_error=np.array(
            [error[:, :passes].max() / scale for passes, error in zip(coverage.passes, errors, strict=True)]
        ),
        continuations=tuple(
            _continue(run, coverage, rows, chain.hidden, targets, handover) for handover in coverage.handovers
        ),
    )


def _continue(
    run: Run, coverage: Coverage, rows: slice, sequential: np.ndarray, targets: np.ndarray, handover: Handover
) -> Continuation:
    span = slice(handover.start, handover.stop)
    expected = sequential[:, span]
    found = [*run.continued(rows, span.start, span.stop, coverage.selected)]
    _, nll, kl = compare_states(run, expected, found, np.ascontiguousarray(targets[:, span]))
    scale = _largest(expected)
    return Continuation(
        handover=handover,
        nll=nll,
        kl=kl,
        state_error=np.array([np.abs(states - expected).max() / scale for states in found], np.float64),
    )


def _largest(states: np.ndarray) -> float:
    return max(float(np.abs(states).max()), float(np.finfo(np.float32).tiny))
