"""Runs of both regimes: the recurrence token by token, K parallel passes for every K, steps continued from K passes.

PyTorch FP32 and a target are asked the same; all runs begin at the start of the windows, each window as one chunk. A
target runs through the engine and the decoder that are deployed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from crt_export.errors import ContractError
from crt_export.models.declaration import HIDDEN, NEXT_STATE, STATE
from crt_export.parity.decoding import Decoding
from crt_export.parity.difference import relative_error
from crt_export.parity.reference import PREFILL, PREFILL_PASS, STEP, Reference
from crt_export.parity.runner import Runner
from crt_export.parity.scores import BLOCK_ELEMENTS


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """What the recurrence gave for some windows, every token a step.

    Attributes:
        hidden: h of every token, float32 [windows, positions, hidden].
        caches: The caches after the last token, ``0.key`` [windows, heads, positions, head_dim]; of targets only.
        logits: Logits of the step at some positions, float32 [windows, vocab] by position; of targets only.
    """

    hidden: np.ndarray
    caches: Mapping[str, np.ndarray] = field(default_factory=dict)
    logits: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefilled:
    """What K passes over some windows left.

    Attributes:
        hidden: h of every token, float32 [windows, positions, hidden].
        logits: Logits after the last token, float32 [windows, vocab].
        caches: As in Chain.
    """

    hidden: np.ndarray
    logits: np.ndarray
    caches: Mapping[str, np.ndarray]


class Run(Protocol):
    """A target or the reference; ``rows`` are windows.

    Attributes:
        vocab: Size of the vocabulary.
    """

    vocab: int

    def chain(self, rows: slice) -> Chain:
        """The recurrence over whole windows."""
        ...

    def passes(self, rows: slice, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Parallel passes over whole windows.

        Returns:
            After 1 to ``most`` of them h of every token, float32 [passes, windows, positions, hidden], and the largest
            |change of h| in that pass, float32 [passes, windows].
        """
        ...

    def continued(self, rows: slice, start: int, stop: int, passes: Sequence[int]) -> Iterator[np.ndarray]:
        """For each number of passes over the first ``start`` tokens, h of the steps from there to ``stop``.

        Yields:
            float32 [windows, stop - start, hidden].
        """
        ...

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits, float32 [windows, positions, vocab]; the caller keeps the pieces small."""
        ...


class ReferenceRun:
    """PyTorch FP32 on the first windows of the reference; see :class:`Run`."""

    def __init__(self, reference: Reference, windows: int, length: int) -> None:
        """Take the first tokens of the first windows; the reference's own chain is used where it is for all."""
        self._reference, self._whole = reference, windows == reference.windows.count
        self._ids = torch.from_numpy(reference.windows.inputs[:windows, :length])
        self.vocab = reference.model.config.vocab_size

    @torch.no_grad()
    def chain(self, rows: slice) -> Chain:
        if self._whole:
            return Chain(hidden=self._reference.hidden(STEP, 1)[rows, : self._ids.shape[1]].numpy())
        return Chain(hidden=self._reference.model.sequential(self._ids[rows])[0].hidden.numpy())

    @torch.no_grad()
    def passes(self, rows: slice, most: int) -> tuple[np.ndarray, np.ndarray]:
        iterate, found = None, []
        for _ in range(most):
            done, _, residual = self._reference.model.unroll(self._ids[rows], 1, iterate=iterate)
            iterate = done.states
            found.append((done.hidden.numpy(), residual.numpy()))
        return np.stack([states for states, _ in found]), np.stack([residual for _, residual in found])

    @torch.no_grad()
    def continued(self, rows: slice, start: int, stop: int, passes: Sequence[int]) -> Iterator[np.ndarray]:
        ids, iterate, model = self._ids[rows], None, self._reference.model
        for count in range(1, max(passes) + 1):
            done, state, _ = model.unroll(ids[:, :start], 1, iterate=iterate)
            iterate = done.states
            if count in passes:
                yield model.sequential(ids[:, start:stop], state)[0].hidden.numpy()

    @torch.no_grad()
    def head(self, hidden: np.ndarray) -> np.ndarray:
        return self._reference.model.head(torch.from_numpy(np.ascontiguousarray(hidden))).float().numpy()


class TargetRun:
    """A target, deployed; see :class:`Run`.

    Attributes:
        runner: The target.
        vocab: Size of the vocabulary.
        step_error: Largest relative difference between a step's logits and the head of its state, so far.
    """

    def __init__(self, runner: Runner, ids: np.ndarray, *, kept: Sequence[int] = ()) -> None:
        """Prepare.

        Args:
            runner: The target.
            ids: Windows, int64 [windows, positions].
            kept: Positions whose logits a chain keeps.
        """
        self.runner, self.vocab = runner, runner.config.vocab_size
        self.step_error = 0.0
        self._ids, self._kept = ids, kept

    def chain(self, rows: slice, *, hidden: np.ndarray | None = None) -> Chain:
        """The recurrence over whole windows.

        Args:
            rows: Windows.
            hidden: For a plain transformer, whose step delivers no h: h of every token from its prefill. The logits of
                each step are compared with the head of h.

        Raises:
            ContractError: A graph failed, or delivered NaN or infinity.
        """
        ids, decoding = self._ids[rows], self._decoding(rows)
        states = np.empty((*ids.shape, self.runner.config.hidden_size), np.float32) if hidden is None else hidden
        size = max(1, min(ids.shape[1], BLOCK_ELEMENTS // (len(ids) * self.vocab)))
        logits, keep = np.empty((len(ids), size, self.vocab), np.float32), {}
        for first in range(0, ids.shape[1], size):
            last = min(first + size, ids.shape[1])
            for position in range(first, last):
                state, logits[:, position - first] = self._step(decoding, rows, position)
                if state is not None and hidden is None:
                    states[:, position] = state
            keep |= {at: logits[:, at - first].copy() for at in self._kept if first <= at < last}
            error = relative_error(logits[:, : last - first], self.head(states[:, first:last]))
            self.step_error = float(np.maximum(self.step_error, error))  # maximum, unlike max, keeps NaN
        return Chain(hidden=states, caches=decoding.caches(ids.shape[1]), logits=keep)

    def passes(self, rows: slice, most: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Run`.

        Raises:
            ContractError: The graph failed, or delivered NaN or infinity.
        """
        hidden, residual = self._decoding(rows).passes(self._ids[rows], most)
        finite = np.isfinite(residual).all(axis=1) & np.isfinite(hidden).all(axis=(1, 2, 3))
        if not finite.all():
            done = int(finite.argmin()) + 1
            raise ContractError(f"{PREFILL_PASS}: next_hidden or residual is NaN or infinite after {done} passes")
        return hidden, residual

    def prefilled(self, rows: slice, tokens: int, passes: int, graph: str) -> Prefilled:
        """Passes over the first ``tokens`` tokens, by ``prefill`` as a prompt is taken, or one by one.

        Raises:
            ContractError: A graph failed, or delivered NaN or infinity.
        """
        decoding = self._decoding(rows)
        decoding.prefill(self._ids[rows, :tokens], passes, pass_by_pass=graph == PREFILL_PASS)
        found = Prefilled(hidden=decoding.hidden, logits=decoding.logits().copy(), caches=decoding.caches(tokens))
        if not (np.isfinite(found.hidden).all() and np.isfinite(found.logits).all()):
            raise ContractError(f"{graph}: next_hidden or logits are NaN or infinite after {passes} passes")
        return found

    def continued(self, rows: slice, start: int, stop: int, passes: Sequence[int]) -> Iterator[np.ndarray]:
        """See :class:`Run`.

        Raises:
            ContractError: A graph failed, or delivered NaN or infinity.
        """
        decoding = self._decoding(rows)
        for count in passes:
            decoding.reset()
            decoding.prefill(self._ids[rows, :start], count)
            states = np.empty((decoding.rows, stop - start, self.runner.config.hidden_size), np.float32)
            for position in range(start, stop):
                states[:, position - start] = self._step(decoding, rows, position)[0]
            yield states

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """See :class:`Run`.

        Raises:
            ContractError: The graph failed or delivered another shape or dtype.
        """
        return self.runner.head(hidden)

    def _decoding(self, rows: slice) -> Decoding:
        return self.runner.decoding(*self._ids[rows].shape)

    def _step(self, decoding: Decoding, rows: slice, position: int) -> tuple[np.ndarray | None, np.ndarray]:
        """One token per window: what the head reads, float32 [windows, hidden], or None if no step gives it; logits."""
        decoding.step(self._ids[rows, position])
        specs, states, logits = self.runner.config.carried.states, decoding.states(), decoding.logits()
        named = {spec.tensor(NEXT_STATE): states[spec.tensor(STATE)] for spec in specs}
        for name, values in (*named.items(), ("logits", logits)):
            if not np.isfinite(values).all():
                row = rows.start + int(np.argmin(np.isfinite(values).reshape(decoding.rows, -1).all(axis=1)))
                raise ContractError(f"step: {name} is NaN or infinite, first in window {row} at position {position}")
        hidden = next((states[spec.tensor(STATE)][:, 0] for spec in specs if spec.name == HIDDEN), None)
        return hidden, logits


class Anchors:
    """Exactness where the parallel passes are the recurrence by the equations, whatever the weights.

    After k passes the first k positions are those of the recurrence, so T passes over T tokens give its states, caches
    and logits up to rounding. ``prefill`` is held to it with its own K, over K tokens.

    Attributes:
        errors: Largest relative error over the batches of windows, by (graph, tokens, passes), then by tensor.
        prefill_error: Of the hidden states of ``prefill`` against those of as many single passes.
        residual_error: Of the residual that the graph reports against the change of next_hidden, per pass.
    """

    def __init__(self, run: TargetRun, tokens: Sequence[int], unroll: int) -> None:
        """Prepare.

        Args:
            run: The target.
            tokens: Over how many tokens there are as many passes.
            unroll: K of the target's prefill.
        """
        self._run, self._tokens, self._unroll = run, tokens, unroll
        self.errors: dict[tuple[str, int, int], dict[str, float]] = {}
        self.prefill_error = self.residual_error = 0.0

    def __call__(self, rows: slice, chain: Chain, states: np.ndarray, residual: np.ndarray) -> None:
        """Look at one batch of windows: what steps and passes gave, see :class:`Run`."""
        unroll, length = self._unroll, states.shape[2]
        for graph, tokens, passes in (
            *((PREFILL_PASS, tokens, tokens) for tokens in self._tokens),
            (PREFILL, min(unroll, length), unroll),
        ):
            found = anchor_errors(self._run.prefilled(rows, tokens, passes, graph), chain, self._run, tokens)
            known = self.errors.setdefault((graph, tokens, passes), dict.fromkeys(found, 0.0))
            known.update({name: float(np.maximum(known[name], error)) for name, error in found.items()})
        if not self._run.runner.one_graph:  # else prefill is these very passes, and its file is held to them elsewhere
            error = relative_error(self._run.prefilled(rows, length, unroll, PREFILL).hidden, states[unroll - 1])
            self.prefill_error = float(np.maximum(self.prefill_error, error))
        before = np.concatenate([np.zeros_like(states[:1]), states[:-1]])
        change = np.stack([np.abs(after - last).max(axis=(1, 2)) for after, last in zip(states, before, strict=True)])
        made = slice(0, length)  # more passes than tokens change nothing and are not made
        self.residual_error = float(np.maximum(self.residual_error, relative_error(residual[made], change[made])))


def anchor_errors(found: Prefilled, chain: Chain, run: TargetRun, tokens: int) -> dict[str, float]:
    """Relative errors by tensor of passes over the first tokens against the steps over them.

    Args:
        found: What the passes left.
        chain: What the steps gave; it has gone on since, and its caches hold these tokens still.
        run: Whose head makes logits of states.
        tokens: How many.
    """
    errors = {"next_hidden": relative_error(found.hidden, chain.hidden[:, :tokens])}
    for name, cache in found.caches.items():
        errors[f"present_key_values.{name}"] = relative_error(cache, chain.caches[name][:, :, :tokens])
    errors["logits"] = relative_error(found.logits, chain.logits[tokens - 1])
    head = run.head(found.hidden[:, tokens - 1 : tokens])[:, 0]
    errors["head logits"] = relative_error(head, chain.logits[tokens - 1])
    return errors


def plain_errors(run: TargetRun, slices: Sequence[slice], length: int) -> dict[str, float]:
    """Errors of a plain transformer, which has one regime: its prefill of whole windows is its steps, up to rounding.

    Returns:
        Relative errors by tensor: caches, the last logits, and those of every step against the head of prefill's h.

    Raises:
        ContractError: A graph failed, or delivered NaN or infinity.
    """
    errors: dict[str, float] = {}
    for rows in slices:
        prefilled = run.prefilled(rows, length, 1, PREFILL)
        chain = run.chain(rows, hidden=prefilled.hidden)
        found = anchor_errors(prefilled, chain, run, length)
        del found["next_hidden"]  # a plain step delivers none
        errors = {name: float(np.maximum(errors.get(name, 0.0), error)) for name, error in found.items()}
    return errors | {"logits of every step": run.step_error}
