"""What the certificate runs on: which windows, which numbers of passes, where decoding is handed over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crt_export.config import ModelConfig
from crt_export.parity.case import ParityCase
from crt_export.parity.comparison import trained_ranges
from crt_export.parity.level import ParitySetup
from crt_export.parity.reference import PREFILL_PASS
from crt_export.parity.windows import Windows

#: Multiply-accumulates that all passes may take, a minute or two on one core; beyond it windows are left out.
MOST_WORK = 1_600_000_000_000
_FEWEST_WINDOWS = 2
#: What a logit's share of a float64 softmax takes, in multiply-accumulates of the passes.
_WORK_PER_LOGIT = 150
#: Memory of the iterates, caches and scores of the windows that run together.
_BATCH_BYTES = 256 * 2**20


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
        whole: Whether these are all windows that were asked for; the limits hold for those.
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


def coverage_of(case: ParityCase, setup: ParitySetup) -> Coverage:
    """What is run for a target; the same for every target with the same K and the same graphs."""
    config, windows = setup.config, setup.windows
    stride = 1 if PREFILL_PASS in case.graphs else case.unroll
    passes = tuple(range(stride, 2 * case.unroll + 1, stride))
    count = _windows_within_work(config, windows, 2 * case.unroll)
    notes = []
    if count < windows.count:
        notes.append(
            f"certificate: {count} of {windows.count} windows, because {2 * case.unroll} passes of "
            f"{config.parameter_count:,} parameters over all of them take too long; likelihoods are reported and not "
            "gated, their limits are for all windows"
        )
    if stride > 1:
        notes.append(
            f"certificate: {case.target} has no prefill_pass graph, so passes are compared {stride} at a time, "
            "through prefill"
        )
    trained = config.training_sequence_length
    selected = {1 << power for power in range(passes[-1].bit_length())} | {case.unroll, 2 * case.unroll}
    bytes_each = _bytes_per_window(case, config, windows.length, len(passes))
    return Coverage(
        unroll=case.unroll,
        trained=trained,
        windows=count,
        length=windows.length,
        whole=count == windows.count,
        passes=passes,
        selected=tuple(sorted(selected & set(passes))),
        spans=tuple(trained_ranges(windows.length, trained)),
        handovers=_handovers(windows.length, trained),
        anchors=tuple(sorted({min(tokens, windows.length) for tokens in (1, 2, case.unroll, 2 * case.unroll)})),
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
