"""Measurement of both regimes: a few numbers per token of each run, never all logits.

Likelihoods are float64 throughout. A float32 log-softmax is right to about 1e-6 of a nat per token (2^-24 of sums near
10), with a bias that a mean does not remove; FP32's gaps are that small, and the float64 form costs little beside the
passes themselves. Both regimes' logits come through the same head, so that their difference is that of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crt_export.config import ModelConfig
from crt_export.parity.certificate.runs import BLOCK_ELEMENTS, Chain, Run
from crt_export.parity.comparison import trained_ranges
from crt_export.parity.scores import divergence
from crt_export.parity.setup import ParityCase, ParitySetup
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


def coverage_of(case: ParityCase, setup: ParitySetup, longest: int) -> Coverage:
    """What is run for a target; the same for every target with the same K.

    Args:
        case: The target.
        setup: Windows and options.
        longest: Most tokens that the target takes at once.
    """
    config, windows = setup.config, setup.windows
    passes = tuple(range(1, 2 * case.unroll + 1))
    length = min(windows.length, longest)
    count = _windows_within_work(config, windows, 2 * case.unroll)
    notes = []
    if length < windows.length:
        notes.append(
            f"certificate: the first {length} of the {windows.length} tokens of every window, which {case.target} "
            "takes at once; likelihoods are reported and not gated, their limits are for whole windows"
        )
    if count < windows.count:
        notes.append(
            f"certificate: {count} of {windows.count} windows, because {2 * case.unroll} passes of "
            f"{config.parameter_count:,} parameters over all of them take too long; likelihoods are reported and not "
            "gated, their limits are for all windows"
        )
    trained = config.training_sequence_length
    selected = {1 << power for power in range(passes[-1].bit_length())} | {case.unroll, 2 * case.unroll}
    bytes_each = _bytes_per_window(case, config, length, len(passes))
    return Coverage(
        unroll=case.unroll,
        trained=trained,
        windows=count,
        length=length,
        whole=(count, length) == (windows.count, windows.length),
        passes=passes,
        selected=tuple(sorted(selected & set(passes))),
        spans=tuple(trained_ranges(length, trained)),
        handovers=_handovers(length, trained),
        anchors=tuple(sorted({min(tokens, length) for tokens in (1, 2, case.unroll, 2 * case.unroll)})),
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


def _bytes_per_window(case: ParityCase, config: ModelConfig, length: int, passes: int) -> int:
    capacity = length if case.capacity is None else case.capacity
    slots = 2 * config.num_hidden_layers * config.num_attention_heads * capacity * config.head_dim
    caches = 3 * slots * np.dtype(case.cache_dtype).itemsize  # of the chain, of the passes and of the hand-over
    # Scores of one layer's attention, and about as much again for its mask and softmax.
    scores = 2 * 4 * config.num_attention_heads * length * (capacity + length)
    iterates = 4 * (passes + 2) * length * config.hidden_size
    return max(1, caches + scores + iterates)


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
        continuations: One per hand-over.
    """

    sequential_nll: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    residual: np.ndarray
    error: np.ndarray
    prefix_error: np.ndarray
    continuations: tuple[Continuation, ...]


def measure(
    run: Run,
    coverage: Coverage,
    targets: np.ndarray,
    *,
    observe: Observer | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Run everything.

    Args:
        run: Of the target or the reference.
        coverage: What to run.
        targets: The token after each one, int64 [windows, positions].
        observe: Sees the states of every batch of windows.
        on_progress: Called with the number of windows done.

    Raises:
        ContractError: A graph failed, or delivered NaN or infinity.
    """
    parts = []
    for rows in coverage.slices:
        parts.append(_measure_rows(run, coverage, rows, targets[rows], observe))
        on_progress(rows.stop)
    return Measurement(
        sequential_nll=np.concatenate([part.sequential_nll for part in parts]),
        nll=np.concatenate([part.nll for part in parts], axis=1),
        kl=np.concatenate([part.kl for part in parts], axis=1),
        residual=np.concatenate([part.residual for part in parts], axis=1),
        error=np.concatenate([part.error for part in parts], axis=1),
        prefix_error=np.max([part.prefix_error for part in parts], axis=0),
        continuations=tuple(
            Continuation(
                handover=same[0].handover,
                nll=np.concatenate([one.nll for one in same], axis=1),
                kl=np.concatenate([one.kl for one in same], axis=1),
                state_error=np.max([one.state_error for one in same], axis=0),
            )
            for same in zip(*(part.continuations for part in parts), strict=True)
        ),
    )


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
        own = _wide(run.head(sequential[:, piece]))
        expected = torch.log_softmax(own, dim=-1)
        nll[0, :, piece] = -expected.gather(-1, wanted[:, piece]).squeeze(-1).numpy()
        for index, states in enumerate(found):
            logits = _wide(run.head(states[:, piece]))
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


def _wide(logits: np.ndarray) -> Tensor:
    return torch.from_numpy(logits).double()


def _largest(states: np.ndarray) -> float:
    return max(float(np.abs(states).max()), float(np.finfo(np.float32).tiny))
