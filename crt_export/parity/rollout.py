"""Regimes of a target, run by its deployed engine and decoder; a scorer gets every logit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from crt_export.errors import ContractError
from crt_export.parity.decoding import Decoding
from crt_export.parity.difference import relative_error
from crt_export.parity.reference import HANDOVER, PREFILL, PREFILL_PASS, STEP
from crt_export.parity.runner import BATCH_BYTES, Runner
from crt_export.parity.scores import BLOCK_ELEMENTS, Scorer
from crt_export.parity.setup import ParityCase
from crt_export.parity.windows import Windows


class Rollout:
    """One target on one set of windows."""

    def __init__(self, runner: Runner, case: ParityCase, windows: Windows, *, window_batch: int) -> None:
        """Prepare; nothing runs yet.

        Args:
            runner: The target.
            case: The same.
            windows: What to run.
            window_batch: Most windows per call; fewer where memory is short.
        """
        self.runner, self.case, self.windows = runner, case, windows
        self.batch = max(1, min(window_batch, BATCH_BYTES // runner.prefill_bytes(windows.length)))
        self.inconsistency: dict[str, float] = {}
        self._hidden: dict[int, np.ndarray] = {}

    def run(self, regime: str, scorer: Scorer, on_progress: Callable[[int], None]) -> None:
        """Run one regime over all windows.

        Args:
            regime: step, prefill, prefill_pass or handover.
            scorer: Takes the logits.
            on_progress: Called with the number of windows done.

        Raises:
            ContractError: A graph broke its contract; what ran until then is in the scorer.
        """
        for start in range(0, self.windows.count, self.batch):
            rows = slice(start, min(start + self.batch, self.windows.count))
            ids = self.windows.inputs[rows]
            decoding = self.runner.decoding(len(ids), self.windows.length)
            if regime == STEP:
                self._step_chain(decoding, ids, rows, scorer)
            elif regime == HANDOVER:
                half = self.windows.length // 2
                self._prefill(decoding, ids[:, :half], PREFILL)
                scorer.add(rows, half - 1, decoding.logits()[:, None])
                self._step_chain(decoding, ids, rows, scorer)
            else:
                self._prefill(decoding, ids, regime)
                self._score_prefill(regime, decoding, rows, scorer)
            on_progress(rows.stop)

    def _step_chain(self, decoding: Decoding, ids: np.ndarray, rows: slice, scorer: Scorer) -> None:
        first = position = decoding.position[0]
        block = self._new_block(rows)
        try:
            for position in range(first, ids.shape[1]):
                if position - first == block.shape[1]:
                    scorer.add(rows, first, block)
                    first = position
                decoding.step(ids[:, position])
                block[:, position - first] = decoding.logits()
                _refuse(decoding.broken)
            position = ids.shape[1]
        finally:
            # Also when a step fails: how far the chain came is part of the report.
            if position > first:
                scorer.add(rows, first, block[:, : position - first])

    def _prefill(self, decoding: Decoding, ids: np.ndarray, regime: str) -> None:
        """K passes over some tokens; the scorer sees the head's logits of every position, not all that came of them."""
        decoding.prefill(ids, self.case.unroll, pass_by_pass=regime == PREFILL_PASS)
        _refuse([*decoding.broken, *decoding.refused])

    def _score_prefill(self, regime: str, decoding: Decoding, rows: slice, scorer: Scorer) -> None:
        hidden, step = decoding.hidden, self._new_block(rows).shape[1]
        logits = np.empty(0)
        for first in range(0, hidden.shape[1], step):
            logits = self.runner.head(hidden[:, first : first + step])
            scorer.add(rows, first, logits)
        self._note(regime, logits[:, -1], decoding.logits())
        if regime == PREFILL:
            self._hidden[rows.start] = hidden.copy()
        elif rows.start in self._hidden:
            self._note(regime, hidden, self._hidden[rows.start])

    def _note(self, name: str, found: np.ndarray, expected: np.ndarray) -> None:
        """Remember the largest relative difference between two forms of the same computation, NaN above all."""
        largest = np.maximum(self.inconsistency.get(name, 0.0), relative_error(found, expected))
        self.inconsistency[name] = float(largest)  # maximum, unlike max, keeps NaN, and NaN is within no limit

    def _new_block(self, rows: slice) -> np.ndarray:
        """Room for the logits of some positions, float32 [windows, positions, vocab]."""
        batch, vocab = rows.stop - rows.start, self.runner.config.vocab_size
        positions = min(self.windows.length, max(1, BLOCK_ELEMENTS // (batch * vocab)))
        return np.empty((batch, positions, vocab), np.float32)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ContractError(problems[0])
