"""A target over a long run: teacher-forced steps, and a watch on every value they deliver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crt_export.config import ModelConfig
from crt_export.engine.onnxruntime import OrtGraph
from crt_export.errors import ContractError
from crt_export.parity.binding import BoundGraph, Caches, new_caches
from crt_export.parity.case import ParityCase, load_checked_graph
from crt_export.parity.level import ParitySetup
from crt_export.parity.long_run.reference import LongReference
from crt_export.parity.long_run.schedule import Schedule
from crt_export.parity.reference import STEP
from crt_export.parity.scores import Scorer, Scores
from crt_export.progress import Progress
from crt_export.runtime.slide import window_from_config
from crt_export.spec import GraphSpec

#: Logits compared at a time: little enough for any vocabulary.
_BLOCK_ELEMENTS = 2_000_000
_PROGRESS_STEPS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetRun:
    """What one run of a target gave, arrays [tokens].

    Attributes:
        scores: Logits against the reference's, [1, tokens].
        state_norm: Euclidean norm of the state; None for a plain transformer, like the two below.
        reference_norm: The same of the reference.
        state_error: Norm of the difference of the two states.
        non_finite: Steps that delivered a NaN or an infinity.
        first_non_finite: Step, position and tensor of the first of them; empty if there is none.
        wrong_position: The first next_position that is not what it should be, as a sentence; empty if there is none.
    """

    scores: Scores
    state_norm: np.ndarray | None
    reference_norm: np.ndarray | None
    state_error: np.ndarray | None
    non_finite: int
    first_non_finite: str
    wrong_position: str


class Steps:
    """One graph fed the tokens of a schedule, its state carried from step to step."""

    def __init__(self, graph: OrtGraph, spec: GraphSpec, schedule: Schedule, ids: np.ndarray) -> None:
        """Bind.

        Args:
            graph: The step graph.
            spec: Its contract.
            schedule: The run.
            ids: Tokens, int64 [1, tokens].
        """
        sizes = {"batch": 1, "capacity": schedule.capacity}
        self.caches: Caches = new_caches(spec, sizes)
        self.bound = BoundGraph(graph, spec, sizes, self.caches)
        self.present = {past: present for present, past in spec.aliases}
        self._schedule, self._ids = schedule, ids

    def run(self, config: ModelConfig, progress: Progress, label: str) -> Iterator[tuple[int, int]]:
        """Run every step; yields its number and its position in the cache when it is done.

        Raises:
            ContractError: ONNX Runtime failed; the message names the step.
        """
        position = 0
        for step in range(self._schedule.tokens):
            if step % _PROGRESS_STEPS == 0:
                progress(label, step, self._schedule.tokens)
            if position == self._schedule.window:
                position = self._empty()
            elif self._schedule.slides and position == self._schedule.capacity:
                position = self._slide(config, position)
            try:
                self.bound.run(input_ids=self._ids[:, step : step + 1], position=np.array([position]))
            except ContractError as error:
                raise ContractError(f"{label}: step {step} at position {position}: {error}") from error
            yield step, position
            if self.bound.has("next_state"):
                self.bound.set(state=self.bound.read("next_state"))
            position += 1
        progress(label, self._schedule.tokens, self._schedule.tokens)

    def _empty(self) -> int:
        """Zero the caches and start at position 0; the state stays."""
        for cache in self.caches.values():
            cache.read().fill(0)
        return 0

    def _slide(self, config: ModelConfig, position: int) -> int:
        """Forget what the attention window does not see, as a session does; the new position."""
        window = window_from_config(config)
        assert window is not None
        for name, cache in self.caches.items():
            row = cache.read()[0]
            row[...] = window.evict(row, position, keys=name.endswith(".key"))
        return window.kept(position)


def run_target(case: ParityCase, setup: ParitySetup, schedule: Schedule, reference: LongReference) -> TargetRun:
    """Decode the tokens with the step graph of a target and compare every step.

    Raises:
        ContractError: The graph breaks its contract or cannot run.
    """
    config, tokens = setup.config, schedule.tokens
    graph = load_checked_graph(case, "step", config, setup.threads)
    steps = Steps(graph, case.spec("step", config), schedule, reference.windows.inputs)
    scorer, watch = Scorer(reference, STEP, 1), _Watch(steps)
    logits = np.empty((1, min(tokens, max(1, _BLOCK_ELEMENTS // config.vocab_size)), config.vocab_size), np.float32)
    states = np.empty((tokens, config.hidden_size), np.float32) if steps.bound.has("next_state") else None
    first, everything = 0, slice(0, 1)
    for step, position in steps.run(config, setup.progress, f"{case.target}: long run, {schedule.kind}"):
        watch.look(step, position)
        if step - first == logits.shape[1]:
            scorer.add(everything, first, logits)
            first = step
        logits[0, step - first] = steps.bound.read("logits")[0]
        if states is not None:
            states[step] = steps.bound.read("next_state")[0, 0]
    scorer.add(everything, first, logits[:, : tokens - first])
    return TargetRun(
        scores=scorer.scores(),
        non_finite=watch.count,
        first_non_finite=watch.first,
        wrong_position=watch.wrong_position,
        **_state_figures(states, reference),
    )


class _Watch:
    """Looks at what every step wrote: cache entries, state, logits, next position."""

    def __init__(self, steps: Steps) -> None:
        self._bound = steps.bound
        self._entries = [(steps.present[name], cache.read()) for name, cache in steps.caches.items()]
        self._outputs = [(name, steps.bound.read(name)) for name in ("next_state", "logits") if steps.bound.has(name)]
        self.count, self.first, self.wrong_position = 0, "", ""

    def look(self, step: int, position: int) -> None:
        """Look at one step; tensors in the order the graph computes them, so the first bad one is named."""
        bad = next((name for name, cache in self._entries if not np.isfinite(cache[0, :, position]).all()), None)
        bad = bad or next((name for name, values in self._outputs if not np.isfinite(values).all()), None)
        if bad is not None:
            self.count += 1
            self.first = self.first or f"step {step} (position {position}), tensor {bad}"
        found = int(self._bound.read("next_position")[0])
        if found != position + 1 and not self.wrong_position:
            self.wrong_position = f"next_position is {found} after step {step}, expected {position + 1}"


def _state_figures(states: np.ndarray | None, reference: LongReference) -> dict[str, np.ndarray | None]:
    """Norms per token, float64 [tokens]."""
    if states is None:
        return {"state_norm": None, "reference_norm": None, "state_error": None}
    expected = reference.states.numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            "state_norm": np.linalg.norm(states.astype(np.float64), axis=1),
            "reference_norm": np.linalg.norm(expected.astype(np.float64), axis=1),
            "state_error": np.linalg.norm(states.astype(np.float64) - expected, axis=1),
        }
