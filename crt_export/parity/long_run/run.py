"""A target over a long run: teacher-forced steps, and a watch on every value they deliver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crt_export.errors import ContractError
from crt_export.parity.decoding import Decoding
from crt_export.parity.long_run.reference import LongReference
from crt_export.parity.long_run.schedule import Schedule
from crt_export.parity.reference import STEP
from crt_export.parity.runner import Runner
from crt_export.parity.scores import Scorer, Scores
from crt_export.parity.setup import ParitySetup
from crt_export.progress import Progress
from crt_export.runtime.slide import window_from_config

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
    """One row fed the tokens of a schedule."""

    def __init__(self, runner: Runner, schedule: Schedule, ids: np.ndarray) -> None:
        """Allocate.

        Args:
            runner: The target.
            schedule: The run.
            ids: Tokens, int64 [1, tokens].
        """
        window = window_from_config(runner.config) if schedule.slides else None
        self.decoding = runner.decoding(1, schedule.capacity, window)
        self._schedule, self._ids = schedule, ids

    def run(self, progress: Progress, label: str) -> Iterator[tuple[int, int]]:
        """Run every step; yields its number and its position in the cache when it is done.

        Raises:
            ContractError: ONNX Runtime failed; the message names the step.
        """
        (position,) = self.decoding.position
        for step in range(self._schedule.tokens):
            if step % _PROGRESS_STEPS == 0:
                progress(label, step, self._schedule.tokens)
            if position == self._schedule.window:
                self.decoding.empty_caches()
            try:
                self.decoding.step(self._ids[:, step])
            except ContractError as error:
                raise ContractError(f"{label}: step {step} at position {position}: {error}") from error
            (position,) = self.decoding.position
            yield step, position - 1
        progress(label, self._schedule.tokens, self._schedule.tokens)


def run_target(runner: Runner, setup: ParitySetup, schedule: Schedule, reference: LongReference) -> TargetRun:
    """Decode the tokens and compare every step.

    Raises:
        ContractError: The graph cannot run.
    """
    config, tokens = setup.config, schedule.tokens
    steps = Steps(runner, schedule, reference.windows.inputs)
    scorer, watch = Scorer(reference, STEP, 1), _Watch(steps.decoding)
    logits = np.empty((1, min(tokens, max(1, _BLOCK_ELEMENTS // config.vocab_size)), config.vocab_size), np.float32)
    states = np.empty((tokens, config.hidden_size), np.float32) if config.recurrent else None
    first, everything = 0, slice(0, 1)
    for step, position in steps.run(setup.progress, f"{runner.target.name}: long run, {schedule.kind}"):
        watch.look(step, position)
        if step - first == logits.shape[1]:
            scorer.add(everything, first, logits)
            first = step
        logits[0, step - first] = steps.decoding.logits()[0]
        if states is not None:
            states[step] = steps.decoding.output("next_state")[0, 0]  # type: ignore[index]  # a recurrent model
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

    def __init__(self, decoding: Decoding) -> None:
        layers = range(decoding.runner.config.num_hidden_layers)
        self._decoding = decoding
        self._caches = [f"present_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        self.count, self.first, self.wrong_position = 0, "", ""

    def look(self, step: int, position: int) -> None:
        """Look at one step; tensors in the order the graph computes them, so the first bad one is named."""
        entries = {name: self._decoding.output(name) for name in (*self._caches, "next_state", "logits")}
        bad = next(
            (
                name
                for name, values in entries.items()
                if values is not None
                and not np.isfinite(values[0, :, position] if name in self._caches else values).all()
            ),
            None,
        )
        if bad is not None:
            self.count += 1
            self.first = self.first or f"step {step} (position {position}), tensor {bad}"
        found = int(self._decoding.output("next_position")[0])  # type: ignore[index]  # every step has it
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
