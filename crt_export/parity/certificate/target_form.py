"""A target's graphs as a form of the model: caches updated in place, state and iterate fed back as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from crt_export.config import ModelConfig
from crt_export.engine.onnxruntime import HostBuffer, OrtGraph
from crt_export.errors import ContractError
from crt_export.parity.binding import BoundGraph, new_caches
from crt_export.parity.case import ParityCase, load_checked_graph
from crt_export.parity.certificate.forms import Chain, Iterate, relative_error
from crt_export.parity.reference import PREFILL, PREFILL_PASS, STEP

#: Logits held at a time: enough to amortise the calls, little enough for any vocabulary.
BLOCK_ELEMENTS = 2_000_000


class TargetForm:
    """The graphs of one target, loaded when first needed.

    Attributes:
        pass_graph: What parallel passes run through: ``prefill_pass``, or ``prefill`` where the target lacks that.
        stride: Passes that one call of it makes.
        vocab: Size of the vocabulary.
        step_error: Largest relative difference between a step's logits and the head of its state, so far.
    """

    def __init__(
        self, case: ParityCase, config: ModelConfig, ids: np.ndarray, *, threads: int, kept: Sequence[int] = ()
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            case: The target.
            config: The model.
            ids: Windows, int64 [windows, positions].
            threads: CPU threads.
            kept: Positions whose logits a chain keeps.
        """
        self.case, self.config, self.ids, self.vocab = case, config, ids, config.vocab_size
        self.pass_graph = PREFILL_PASS if PREFILL_PASS in case.graphs else PREFILL
        self.stride = 1 if self.pass_graph == PREFILL_PASS else case.unroll
        self.step_error = 0.0
        self._capacity = ids.shape[1] if case.capacity is None else case.capacity
        self._threads, self._kept = threads, kept
        self._graphs: dict[str, OrtGraph] = {}

    def chain(self, rows: slice, *, hidden: np.ndarray | None = None) -> Chain:
        """The recurrence over whole windows.

        Args:
            rows: Windows.
            hidden: For a plain transformer, whose step delivers no h: h of every token from its prefill. The logits of
                each step are compared with the head of h.

        Raises:
            ContractError: A graph failed, or delivered NaN or infinity.
        """
        ids, caches = self.ids[rows], self._caches(rows)
        bound = self._bound(STEP, rows, caches)
        recurrent = hidden is None
        states = np.empty((*ids.shape, self.config.hidden_size), np.float32) if hidden is None else hidden
        size = max(1, min(ids.shape[1], BLOCK_ELEMENTS // (len(ids) * self.vocab)))
        logits, keep = np.empty((len(ids), size, self.vocab), np.float32), {}
        for first in range(0, ids.shape[1], size):
            last = min(first + size, ids.shape[1])
            for position in range(first, last):
                self._step(bound, rows, position)
                if recurrent:
                    states[:, position] = bound.read("next_state")[:, 0]
                logits[:, position - first] = bound.read("logits")
            keep |= {at: logits[:, at - first].copy() for at in self._kept if first <= at < last}
            error = relative_error(logits[:, : last - first], self.head(states[:, first:last]))
            self.step_error = float(np.maximum(self.step_error, error))  # maximum, unlike max, keeps NaN
        return Chain(hidden=states, caches=_arrays(caches), logits=keep)

    def iterate(
        self, rows: slice, tokens: int, passes: Sequence[int], *, graph: str = "", caches: dict | None = None
    ) -> Iterator[Iterate]:
        """Parallel passes, each call fed the iterate of the one before.

        Args:
            rows: Windows.
            tokens: The first so many tokens of the windows.
            passes: After which numbers of passes to yield; multiples of the passes that a call makes.
            graph: ``prefill`` to make them through it; empty takes ``pass_graph``.
            caches: Where to write; None takes new ones.

        Raises:
            ContractError: A graph failed, or delivered NaN or infinity.
        """
        graph = graph or self.pass_graph
        stride = 1 if graph == PREFILL_PASS else self.case.unroll
        caches = self._caches(rows) if caches is None else caches
        bound = self._bound(graph, rows, caches, seq=tokens)
        ids = self.ids[rows, :tokens]
        bound.set(input_ids=ids, length=np.full(len(ids), tokens))
        for done in range(stride, max(passes) + 1, stride):
            bound.run()
            hidden = bound.read("next_hidden")
            residual = bound.read("residual") if bound.has("residual") else np.zeros(len(ids), np.float32)
            if not (np.isfinite(residual).all() and np.isfinite(hidden).all()):
                raise ContractError(f"{graph}: next_hidden or residual is NaN or infinite after {done} passes")
            if done in passes:
                logits = bound.read("logits")
                yield Iterate(hidden=hidden, residual=residual, logits=logits, caches=_arrays(caches))
            bound.set(hidden=hidden)

    def continued(self, rows: slice, start: int, stop: int, passes: Sequence[int]) -> Iterator[np.ndarray]:
        """The recurrence from K passes, see :class:`crt_export.parity.certificate.forms.Form`.

        Raises:
            ContractError: A graph failed, or delivered NaN or infinity.
        """
        copies = self._caches(rows)
        bound = self._bound(STEP, rows, copies)
        for iterate in self.iterate(rows, start, passes):
            for name, buffer in copies.items():
                buffer.write(iterate.caches[name])
            bound.set(state=iterate.hidden[:, -1:])
            states = np.empty((len(self.ids[rows]), stop - start, self.config.hidden_size), np.float32)
            for position in range(start, stop):
                self._step(bound, rows, position)
                states[:, position - start] = bound.read("next_state")[:, 0]
            yield states

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits, float32 [windows, positions, vocab].

        Raises:
            ContractError: The graph failed or delivered another shape or dtype.
        """
        logits = self._graph("head").run({"hidden": np.ascontiguousarray(hidden)})["logits"]
        expected = (*hidden.shape[:2], self.vocab)
        if logits.shape != expected or logits.dtype != np.float32:
            raise ContractError(
                f"head: logits are {logits.dtype} {list(logits.shape)}, expected float32 {list(expected)}"
            )
        return logits

    def _step(self, bound: BoundGraph, rows: slice, position: int) -> None:
        """One token per window; the state is carried over."""
        ids = self.ids[rows, position : position + 1]
        bound.run(input_ids=ids, position=np.full(len(ids), position))
        for name in (name for name in ("next_state", "logits") if bound.has(name)):
            values = bound.read(name)
            if not np.isfinite(values).all():
                row = rows.start + int(np.argmin(np.isfinite(values).reshape(len(ids), -1).all(axis=1)))
                raise ContractError(f"step: {name} is NaN or infinite, first in window {row} at position {position}")
        if bound.has("next_state"):
            bound.set(state=bound.read("next_state"))

    def _graph(self, name: str) -> OrtGraph:
        if name not in self._graphs:
            self._graphs[name] = load_checked_graph(self.case, name, self.config, self._threads)
        return self._graphs[name]

    def _bound(self, name: str, rows: slice, caches: dict[str, HostBuffer], **sizes: int) -> BoundGraph:
        spec = self.case.spec(name, self.config)
        return BoundGraph(self._graph(name), spec, {**self._sizes(rows), **sizes}, caches)

    def _caches(self, rows: slice) -> dict[str, HostBuffer]:
        return new_caches(self.case.spec(STEP, self.config), self._sizes(rows))

    def _sizes(self, rows: slice) -> dict[str, int]:
        return {"batch": len(self.ids[rows]), "capacity": self._capacity}


def _arrays(caches: dict[str, HostBuffer]) -> dict[str, np.ndarray]:
    return {name: buffer.read() for name, buffer in caches.items()}
