"""Decoding of rows by the deployed decoder, and what the engine delivered on the way.

Two things differ from a session, so that a level can say where and what comes after. What the engine delivers is
looked at call by call (:attr:`Decoding.broken`); and values that are not finite or ids outside the vocabulary, at which
a session ends, are noted (:attr:`Decoding.refused`) and decoding goes on. An output that a graph leaves unwritten is
NaN, or -1, and never what the call before left there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crt_export.errors import ContractError
from crt_export.parity.tap import Tap, TappedEngine
from crt_export.runtime.decoder import Decoder
from crt_export.runtime.prefill import PrefillRule
from crt_export.runtime.rows import Batch
from crt_export.runtime.slide import Window

if TYPE_CHECKING:
    from crt_export.parity.runner import Runner


class Decoding:
    """Rows that decode together, and what the engine delivered in the latest call.

    Attributes:
        runner: Whose engine runs.
        refused: What a session would have ended at in the latest call: values that are not finite, unknown ids.
    """

    def __init__(self, runner: Runner, rows: int, capacity: int, windows: Sequence[Window] | None) -> None:
        """Allocate; :meth:`Runner.decoding` makes one."""
        target = runner.target
        self.runner = runner
        self._tap = Tap()
        self._decoder = _NotingDecoder(
            TappedEngine(runner.engine, self._tap),
            target.sizes(runner.config.info, rows, capacity),
            target=target.name,
            windows=windows,
            rows_are_independent=target.rows_are_independent,
            plan=target.prefill,
        )
        self.refused: list[str] = self._decoder.refused

    @property
    def rows(self) -> int:
        """How many."""
        return self._decoder.sizes.batch

    @property
    def capacity(self) -> int:
        """Most tokens of a row."""
        return self._decoder.sizes.capacity

    @property
    def position(self) -> list[int]:
        """Tokens in the cache of each row, as the decoder counts them."""
        return self._decoder.position

    @property
    def broken(self) -> list[str]:
        """What outputs of the latest call contradict each other or the inputs, as sentences."""
        return self._tap.broken

    @property
    def hidden(self) -> np.ndarray:
        """h of every token of the latest prefill, float32 [rows, tokens, hidden]."""
        return self._tap.hidden

    def step(self, ids: np.ndarray) -> None:
        """Feed one token per row, int64 [rows].

        Raises:
            ContractError: The engine failed.
        """
        self._begin(0)
        self._decoder.step(ids.tolist(), read_logits=True)

    def prefill(self, ids: np.ndarray, passes: int, *, pass_by_pass: bool = False) -> None:
        """Feed some tokens per row in parallel passes.

        Args:
            ids: int64 [rows, tokens].
            passes: Number K of passes.
            pass_by_pass: Through the graph of one pass even where the target has one that makes all K.

        Raises:
            ContractError: The engine failed.
            UnsupportedError: The target has no graph of one pass.
        """
        self._begin(ids.shape[1])
        rule = self._decoder.prefill_rule(passes if self.runner.config.carried.iterated else None, None)
        if pass_by_pass:
            rule = PrefillRule(passes=passes, bound=None, shortest=1, chunk=self._decoder.max_chunk)
        self._decoder.prefill(list(ids), rule)

    def passes(self, ids: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Feed some tokens per row in one chunk, one pass at a time, and keep what every pass gave.

        Args:
            ids: int64 [rows, tokens].
            most: Number of passes.

        Returns:
            After each pass h of every token, float32 [passes, rows, tokens, hidden], and the largest |change of h| in
            it, float32 [passes, rows]. Passes that are not made, since nothing is left to change, are as the last.

        Raises:
            ContractError: The engine failed.
            UnsupportedError: The target has no graph of one pass.
        """
        hidden = np.empty((most, *ids.shape, self.runner.config.hidden_size), np.float32)
        residual, made = np.empty((most, self.rows), np.float32), [0] * self.rows

        def keep(rows: slice, change: np.ndarray) -> None:
            done = made[rows.start]
            hidden[done, rows], residual[done, rows] = self._tap.hidden[rows], change
            made[rows] = [done + 1] * (rows.stop - rows.start)

        self._tap.on_pass = keep
        try:
            self.prefill(ids, most, pass_by_pass=True)
        finally:
            self._tap.on_pass = None
        for row, done in enumerate(made):
            hidden[done:, row], residual[done:, row] = hidden[done - 1, row], residual[done - 1, row]
        return hidden, residual

    def reset(self) -> None:
        """Forget every token, as a session does before another text."""
        self._decoder.reset()

    def empty_caches(self) -> None:
        """Start again at position 0 with the states as they are, which no session does: the rule of chained windows."""
        kept = self.states()
        self._decoder.reset()
        self._decoder.tensors.restore(self._decoder.tensors.caches(0), kept)

    def place(self, position: int, states: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray]) -> None:
        """Go on from another place, as from a snapshot.

        Args:
            position: Tokens in the cache of each row.
            states: By the name of the graphs' input, float32 [rows, 1, *shape].
            caches: ``0.key`` and so on to the entries, [rows, heads, position, head_dim].
        """
        self._decoder.reset()
        self._decoder.tensors.restore(caches, states)
        self._decoder.position = [position] * self.rows
        self._decoder.tensors.clear(self._decoder.position)

    def output(self, name: str) -> np.ndarray | None:
        """What the engine wrote to an output in the latest call, [rows, ...]; None where its graph has none.

        Caches are whole, ``present_key_values.0.key`` [rows, heads, length, head_dim]; may be the memory itself.
        """
        return self._tap.output(name)

    def states(self) -> dict[str, np.ndarray]:
        """Copies of the recurrent states by the name of the graphs' input, float32 [rows, 1, *shape]."""
        return {name: values.copy() for name, values in self._decoder.tensors.states().items()}

    def logits(self) -> np.ndarray:
        """Logits after each row's last token, float32 [rows, vocab]; may be the memory itself."""
        return self._decoder.tensors.logits()

    def next_tokens(self) -> np.ndarray:
        """The engine's choice after each row's last token, int64 [rows]."""
        return np.array(self._decoder.next_tokens)

    def caches(self, length: int) -> dict[str, np.ndarray]:
        """Copies of the first ``length`` entries of every cache, ``0.key`` [rows, heads, length, head_dim]."""
        return self._decoder.tensors.caches(length)

    def _begin(self, tokens: int) -> None:
        self.refused.clear()
        self._tap.begin(self._decoder.position, tokens, self.runner.config.hidden_size)


class _NotingDecoder(Decoder):
    """The deployed decoder, which notes what it would refuse."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.refused: list[str] = []

    def _refuse_non_finite(self, name: str, values: np.ndarray | None, batch: Batch, lengths: Sequence[int]) -> None:
        try:
            super()._refuse_non_finite(name, values, batch, lengths)
        except ContractError as error:
            self.refused.append(str(error))

    def _refuse_unknown_tokens(self, chosen: list[int], batch: Batch) -> None:
        try:
            super()._refuse_unknown_tokens(chosen, batch)
        except ContractError as error:
            self.refused.append(str(error))
