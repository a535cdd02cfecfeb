"""The decoder: feeds tokens to an engine, keeps what came back of every row: position, logits, next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crt_export.engine.base import Engine
from crt_export.errors import ContractError, InputError, problem_list
from crt_export.runtime.caches import TensorSizes
from crt_export.runtime.history import NO_TOKEN
from crt_export.runtime.prefill import PrefillPlan, PrefillRule, prefill_rule
from crt_export.runtime.rows import Batch, batches_from_lengths, capacity_problems
from crt_export.runtime.slide import Window
from crt_export.runtime.tensors import SessionTensors


class Decoder:
    """The work of a session, without its guards: arguments are checked, and one call runs at a time.

    Attributes:
        sizes: Sizes of the tensors.
        tensors: The tensors.
        position: Tokens in the cache of each row. Lists, here and below: a few numbers are handled several times
            in every step, which takes numpy longer than the step of a small model can spare.
        next_tokens: The engine's argmax after each row's last token; ``NO_TOKEN`` where there is none.
        max_chunk: Most tokens of one prefill call.
    """

    def __init__(
        self,
        engine: Engine,
        sizes: TensorSizes,
        *,
        target: str,
        windows: Sequence[Window] | None,
        rows_are_independent: bool = True,
        plan: PrefillPlan | None = None,
    ) -> None:
        """Allocate the tensors.

        Args:
            engine: Where it computes.
            sizes: Sizes of the tensors.
            target: Name of the target, for messages.
            windows: Per cache, where full rows evict what none of them sees any longer; at most as large as the
                capacity.
            rows_are_independent: Whether rows may share a call of the engine.
            plan: How prompts are taken unless a call says otherwise; None: in the passes it was built with.
        """
        self.sizes = sizes
        self.tensors = SessionTensors(engine, sizes, rows_are_independent=rows_are_independent)
        self.position = [0] * sizes.batch
        self.next_tokens = [NO_TOKEN] * sizes.batch
        # What an eviction keeps and a chunk always fit together. The limit holds from the first chunk on, so that
        # chunks are cut alike however full a row is.
        self.max_chunk = engine.max_tokens
        if windows is not None:
            self.max_chunk = min(engine.max_tokens, sizes.capacity - (windows[0].size - 1))
        self._engine = engine
        self._host_memory = engine.host_memory
        self._target = target
        self._windows = windows
        self._rows_are_independent = rows_are_independent
        self._plan = PrefillPlan() if plan is None else plan
        # A row without any token yet has no logits; NaN makes a use of them an error instead of a wrong token.
        self._logits = np.full((sizes.batch, sizes.vocab), np.nan, np.float32)
        # Rows whose logits lie in the engine's tensor alone.
        self._logits_on_device = [False] * sizes.batch

    def check_room(self, lengths: Sequence[int], heading: str = "the cache is too small") -> None:
        """Refuse more tokens than fit; a session that evicts has room for any number.

        Raises:
            InputError: Lists every row whose tokens exceed the capacity.
        """
        if self._windows is not None:
            return
        problems = capacity_problems(self.position, lengths, self.sizes.capacity)
        if problems:
            raise InputError(problem_list(heading, problems))

    def prefill_rule(self, passes: int | str | None, chunk: int | None = None) -> PrefillRule:
        """What a prefill comes to; loads the graph of one pass if it needs that and does not have it yet.

        Raises:
            InputError: ``passes`` is neither a whole number of at least 1 nor a word that is known, or ``chunk`` is out
                of range.
            UnsupportedError: A model that is not iterated, or a target without such a graph or without a bound.
            BundleError: Its file is missing or differs from what was built.
            ContractError: It cannot be loaded or breaks the contract.
        """
        rule = prefill_rule(
            self._plan,
            passes,
            chunk,
            most=self.max_chunk,
            iterated=self.sizes.model.carried.iterated,
            unroll=self.sizes.unroll,
            target=self._target,
        )
        if rule.passes is not None:
            self._engine.program("prefill_pass")
        return rule

    def prefill(self, tokens: Sequence[np.ndarray], rule: PrefillRule) -> None:
        """Feed the tokens of every row, int64 [length], cut at multiples of the chunk of that row's own tokens."""
        for begin in range(0, max(row.size for row in tokens), rule.chunk):
            pieces = [row[begin : begin + rule.chunk] for row in tokens]
            self._feed_steps([piece if piece.size < rule.shortest else piece[:0] for piece in pieces])
            self._feed_passes([piece if piece.size >= rule.shortest else piece[:0] for piece in pieces], rule)

    def _feed_steps(self, pieces: Sequence[np.ndarray]) -> None:
        rows = [piece.tolist() for piece in pieces]
        for index in range(max(map(len, rows))):
            self.step([row[index] if index < len(row) else NO_TOKEN for row in rows], read_logits=False)

    def _feed_passes(self, pieces: Sequence[np.ndarray], rule: PrefillRule) -> None:
        lengths = [piece.size for piece in pieces]
        # How many passes a row takes until its residual is small must not depend on its neighbours.
        batches = self._batches(lengths, rows_are_independent=self._rows_are_independent and rule.bound is None)
        if not batches:
            return
        for batch, residual in self.tensors.prefill(pieces, self.position, batches, rule.passes, rule.bound):
            self._refuse_non_finite("residual", residual, batch, lengths)
        self._finish(batches, lengths, read_logits=True)

    def step(self, ids: Sequence[int], *, read_logits: bool) -> None:
        """Feed one token per row, none where it is ``NO_TOKEN``."""
        lengths = [int(token != NO_TOKEN) for token in ids]
        batches = self._batches(lengths)
        # Rows that take no part have a valid id too, for engines that look up every one.
        self.tensors.step([max(token, 0) for token in ids], self.position, batches)
        self._finish(batches, lengths, read_logits=read_logits)

    def logits(self) -> np.ndarray:
        """Logits after each row's last token, float32 [batch, vocab], a copy; NaN where there is none.

        Raises:
            ContractError: They are not finite, which a call that did not read them could not see.
        """
        if True in self._logits_on_device:
            found = self.tensors.logits()
            if self._host_memory and False not in self._logits_on_device:
                return found.copy()  # checked by the call that gave them
            rows = [row for row, on_device in enumerate(self._logits_on_device) if on_device]
            lengths = [0] * self.sizes.batch
            for row in rows:
                self._refuse_non_finite("logits", found[row : row + 1], Batch(row, row + 1, 1), lengths)
            self._logits[rows] = found[rows]
            self._logits_on_device = [False] * self.sizes.batch
        return self._logits.copy()

    def contents(self) -> dict[str, np.ndarray]:
        """Copies of what the next call depends on, under the names of a snapshot."""
        caches = self.tensors.caches(max(self.position))
        return {
            "position": np.array(self.position, np.int64),
            "next_tokens": np.array(self.next_tokens, np.int64),
            "logits": self.logits(),
            **{name: np.array(values) for name, values in self.tensors.states().items()},
            **{f"past_key_values.{name}": cache for name, cache in caches.items()},
        }

    def restore(self, contents: dict[str, np.ndarray]) -> None:
        """Take everything from checked contents; rows without tokens come out as new."""
        prefix = "past_key_values."
        caches = {name.removeprefix(prefix): values for name, values in contents.items() if name.startswith(prefix)}
        self.tensors.restore(caches, contents)
        filled = contents["position"] > 0
        self.position = contents["position"].tolist()
        self.tensors.clear(self.position)
        self.next_tokens = np.where(filled, contents["next_tokens"], NO_TOKEN).tolist()
        self._logits[:] = np.where(filled[:, None], contents["logits"], np.float32(np.nan))
        self._logits_on_device = [False] * self.sizes.batch

    def reset(self) -> None:
        """Forget every token; zero caches and states."""
        self.position = [0] * self.sizes.batch
        self.next_tokens = [NO_TOKEN] * self.sizes.batch
        self._logits[:] = np.nan
        self._logits_on_device = [False] * self.sizes.batch
        self.tensors.clear(self.position)

    def abandon(self, position: list[int]) -> None:
        """Leave nothing behind of a call that failed: count as before it, and clear the rest."""
        self.position = position
        self.tensors.clear(position)

    def _batches(self, lengths: Sequence[int], *, rows_are_independent: bool | None = None) -> list[Batch]:
        """Rows that run together, after making room where rows evict."""
        rows_are_independent = self._rows_are_independent if rows_are_independent is None else rows_are_independent
        if self._windows is not None:
            full = {
                row: self.position[row]
                for row, length in enumerate(lengths)
                if length and self.position[row] + length > self.sizes.capacity
            }
            if full:
                self.tensors.evict(full, self._windows)
                for row, position in full.items():
                    self.position[row] = self._windows[0].kept(position)
        pads = not self._host_memory  # on a device a call per row costs more than padding
        return batches_from_lengths(
            self.position, lengths, self.sizes.capacity, rows_are_independent=rows_are_independent, pads=pads
        )

    def _finish(self, batches: Sequence[Batch], lengths: Sequence[int], *, read_logits: bool) -> None:
        """Check what the engine wrote, then count the tokens and keep the results."""
        states = self.tensors.states()
        logits = self.tensors.logits() if read_logits or self._host_memory else None
        chosen = self.tensors.next_tokens()
        for batch in batches:
            rows = slice(batch.start, batch.stop)
            for name, values in states.items():
                self._refuse_non_finite(name, values[rows], batch, lengths)
            self._refuse_non_finite("logits", None if logits is None else logits[rows], batch, lengths)
            self._refuse_unknown_tokens(chosen[rows], batch)
        for batch in batches:
            rows = slice(batch.start, batch.stop)
            self.next_tokens[rows] = chosen[rows]
            if logits is not None and not self._host_memory:
                self._logits[rows] = logits[rows]
            self._logits_on_device[rows] = [logits is None or self._host_memory] * (batch.stop - batch.start)
        self.position = [position + length for position, length in zip(self.position, lengths, strict=True)]

    def _refuse_non_finite(self, name: str, values: np.ndarray | None, batch: Batch, lengths: Sequence[int]) -> None:
        # The ufunc itself: all() is a Python function around it, and code is cold after a step has read its weights.
        if values is None or np.logical_and.reduce(np.isfinite(values), axis=None):
            return
        problems = [
            f"row {row} after position {self.position[row] + lengths[row] - 1}"
            for row in range(batch.start, batch.stop)
            if not np.isfinite(values[row - batch.start]).all()
        ]
        raise ContractError(problem_list(f"{self._target}: {name} is not finite", problems))

    def _refuse_unknown_tokens(self, chosen: list[int], batch: Batch) -> None:
        problems = [
            f"row {batch.start + index} has {token}"
            for index, token in enumerate(chosen)
            if not 0 <= token < self.sizes.vocab
        ]
        if problems:
            raise ContractError(problem_list(f"{self._target}: next_token is outside the vocabulary", problems))
