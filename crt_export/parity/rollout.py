"""Run the graphs of a target through the regimes and hand every logit to a scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crt_export.config import ModelConfig
from crt_export.engine.onnxruntime import OrtGraph
from crt_export.errors import ContractError
from crt_export.parity.binding import BoundGraph, Caches, new_caches
from crt_export.parity.case import ParityCase, load_checked_graph
from crt_export.parity.reference import HANDOVER, PREFILL, PREFILL_PASS, STEP
from crt_export.parity.scores import Scorer
from crt_export.parity.windows import Windows

#: Logits compared at a time: enough to amortise the calls, little enough for any vocabulary.
_BLOCK_ELEMENTS = 2_000_000
_BATCH_BYTES = 512 * 2**20

#: Graph files a regime runs, in the order they run.
GRAPHS_OF_REGIME = {
    STEP: ("step",),
    PREFILL: ("prefill", "head"),
    PREFILL_PASS: ("prefill_pass", "head"),
    HANDOVER: ("prefill", "step"),
}


class Rollout:
    """The graphs of one target, loaded when first needed, on one set of windows."""

    def __init__(
        self, case: ParityCase, config: ModelConfig, windows: Windows, *, window_batch: int, threads: int
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            case: The target.
            config: The model.
            windows: What to run.
            window_batch: Most windows per call; fewer where memory is short.
            threads: CPU threads, 0 for every core.
        """
        self.case, self.config, self.windows = case, config, windows
        self.capacity = windows.length if case.capacity is None else case.capacity
        self.batch = max(1, min(window_batch, _BATCH_BYTES // self._bytes_per_window()))
        self.inconsistency: dict[str, float] = {}
        self._threads = threads
        self._graphs: dict[str, OrtGraph] = {}
        self._hidden: dict[int, np.ndarray] = {}

    def graph(self, name: str) -> OrtGraph:
        """One graph, checked against its contract when it is loaded.

        Raises:
            ContractError: The file differs from its contract or cannot be loaded.
        """
        if name not in self._graphs:
            self._graphs[name] = load_checked_graph(self.case, name, self.config, self._threads)
        return self._graphs[name]

    def release(self) -> None:
        """Drop the loaded graphs and what they left; the next use loads them again."""
        self._graphs.clear()
        self._hidden.clear()

    def run(self, regime: str, scorer: Scorer, on_progress: Callable[[int], None]) -> None:
        """Run one regime over all windows.

        Args:
            regime: step, prefill, prefill_pass or handover.
            scorer: Takes the logits.
            on_progress: Called with the number of windows done.

        Raises:
            ContractError: A graph broke its contract; what ran until then is in the scorer.
        """
        for rows in self._window_slices():
            ids = self.windows.inputs[rows]
            caches = new_caches(self.case.spec("step", self.config), self._sizes(rows))
            if regime == STEP:
                self._step_chain(ids, rows, caches, scorer, 0, None)
            elif regime == HANDOVER:
                half = self.windows.length // 2
                prefill = self._prefill("prefill", ids[:, :half], rows, caches, self._passes("prefill"))
                scorer.add(rows, half - 1, prefill.read("logits")[:, None])
                self._step_chain(ids, rows, caches, scorer, half, self._state(prefill))
            else:
                bound = self._prefill(regime, ids, rows, caches, self._passes(regime))
                self._score_prefill(regime, bound, rows, scorer)
            on_progress(rows.stop)

    def _passes(self, graph: str) -> int:
        """Calls of a prefill graph that make K passes."""
        return self.case.unroll if graph == PREFILL_PASS else 1

    def _step_chain(
        self, ids: np.ndarray, rows: slice, caches: Caches, scorer: Scorer, start: int, state: np.ndarray | None
    ) -> None:
        spec = self.case.spec("step", self.config)
        bound = BoundGraph(self.graph("step"), spec, self._sizes(rows), caches)
        if state is not None:
            bound.set(state=state)
        block, first, position = self._new_block(rows), start, start
        try:
            for position in range(start, ids.shape[1]):
                if position - first == block.shape[1]:
                    scorer.add(rows, first, block)
                    first = position
                self._step(bound, ids[:, position : position + 1], position, block[:, position - first])
            position = ids.shape[1]
        finally:
            # Also when a step fails: how far the chain came is part of the report.
            if position > first:
                scorer.add(rows, first, block[:, : position - first])

    def _step(self, bound: BoundGraph, ids: np.ndarray, position: int, logits: np.ndarray) -> None:
        """One token per window; fills ``logits`` [windows, vocab] and carries the state over."""
        bound.run(input_ids=ids, position=np.full(len(ids), position))
        logits[:] = bound.read("logits")
        self._check_token_outputs(bound, logits, position + 1, "step")
        if bound.has("next_state"):
            bound.set(state=bound.read("next_state"))

    def _prefill(self, name: str, ids: np.ndarray, rows: slice, caches: Caches, calls: int) -> BoundGraph:
        spec, sizes = self.case.spec(name, self.config), {**self._sizes(rows), "seq": ids.shape[1]}
        bound = BoundGraph(self.graph(name), spec, sizes, caches)
        bound.set(input_ids=ids, length=np.full(len(ids), ids.shape[1]))
        for _ in range(calls):
            bound.run()
            self._check_token_outputs(bound, bound.read("logits"), ids.shape[1], name)
            if bound.has("residual"):
                _check_finite(bound.read("residual"), f"{name}: residual is NaN or infinite, so a hidden state is")
                bound.set(hidden=bound.read("next_hidden"))
            # The scorer sees the head's logits of every position, not these of the last one.
            _check_finite(bound.read("logits"), f"{name}: logits are NaN or infinite")
        self._check_last_state(bound, name)
        return bound

    def _score_prefill(self, name: str, bound: BoundGraph, rows: slice, scorer: Scorer) -> None:
        hidden, head = bound.read("next_hidden"), self.graph("head")
        step = self._new_block(rows).shape[1]
        logits = np.empty(0)
        for first in range(0, hidden.shape[1], step):
            logits = head.run({"hidden": np.ascontiguousarray(hidden[:, first : first + step])})["logits"]
            expected = (hidden.shape[0], min(step, hidden.shape[1] - first), self.config.vocab_size)
            if logits.shape != expected or logits.dtype != np.float32:
                raise ContractError(
                    f"head: logits are {logits.dtype} {list(logits.shape)}, expected float32 {list(expected)}"
                )
            scorer.add(rows, first, logits)
        self._note(name, logits[:, -1], bound.read("logits"))
        if name == PREFILL:
            self._hidden[rows.start] = hidden.copy()
        elif rows.start in self._hidden:
            self._note(name, hidden, self._hidden[rows.start])

    def _check_token_outputs(self, bound: BoundGraph, logits: np.ndarray, position: int, name: str) -> None:
        """next_token and next_position say what logits and input say."""
        wrong = bound.read("next_position") != position
        if wrong.any():
            found = bound.read("next_position")[wrong][0]
            raise ContractError(f"{name}: next_position is {found} after token {position - 1}, expected {position}")
        best = logits.argmax(axis=-1)
        if np.isfinite(logits).all() and (bound.read("next_token")[:, 0] != best).any():
            raise ContractError(f"{name}: next_token after token {position - 1} is not the argmax of logits")

    def _check_last_state(self, bound: BoundGraph, name: str) -> None:
        """next_state is h of the last token; in these calls nothing is padded."""
        if bound.has("next_state") and not np.array_equal(bound.read("next_state"), bound.read("next_hidden")[:, -1:]):
            raise ContractError(f"{name}: next_state is not next_hidden of the last token")

    @staticmethod
    def _state(bound: BoundGraph) -> np.ndarray | None:
        return bound.read("next_state").copy() if bound.has("next_state") else None

    def _note(self, name: str, found: np.ndarray, expected: np.ndarray) -> None:
        """Remember the largest relative difference between two forms of the same computation, NaN above all."""
        with np.errstate(invalid="ignore"):
            scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
            difference = float(np.abs(found - expected).max()) / scale
        # maximum, unlike max, keeps NaN, and NaN is within no limit.
        self.inconsistency[name] = float(np.maximum(self.inconsistency.get(name, 0.0), difference))

    def _new_block(self, rows: slice) -> np.ndarray:
        """Room for the logits of some positions, float32 [windows, positions, vocab]."""
        batch, vocab = rows.stop - rows.start, self.config.vocab_size
        positions = min(self.windows.length, max(1, _BLOCK_ELEMENTS // (batch * vocab)))
        return np.empty((batch, positions, vocab), np.float32)

    def _window_slices(self) -> Iterator[slice]:
        for start in range(0, self.windows.count, self.batch):
            yield slice(start, min(start + self.batch, self.windows.count))

    def _sizes(self, rows: slice) -> dict[str, int]:
        return {"batch": rows.stop - rows.start, "capacity": self.capacity}

    def _bytes_per_window(self) -> int:
        config, length = self.config, self.windows.length
        item = np.dtype(self.case.cache_dtype).itemsize
        cache = 2 * config.num_hidden_layers * config.num_attention_heads * self.capacity * config.head_dim * item
        # Scores of one layer's attention in prefill, and about as much again for its mask and softmax.
        scores = 2 * 4 * config.num_attention_heads * length * (self.capacity + length)
        return max(1, cache + scores)


def _check_finite(values: np.ndarray, problem: str) -> None:
    if not np.isfinite(values).all():
        raise ContractError(problem)
