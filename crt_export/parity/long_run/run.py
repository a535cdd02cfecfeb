"""A target over a long run: teacher-forced steps, a watch on every value they deliver, and the largest FP16 values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from crt_export.errors import ContractError
from crt_export.models.declaration import HIDDEN, NEXT_STATE
from crt_export.parity.decoding import Decoding
from crt_export.parity.headroom import observing_engine
from crt_export.parity.long_run.schedule import Schedule
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.runner import Runner
from crt_export.parity.scores import BLOCK_ELEMENTS, Scorer, Scores
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.progress import Progress
from crt_export.runtime.slide import windows_of_caches

_PROGRESS_STEPS = 1000
_WEIGHT = re.compile(r"(embed|correction|layers\.\d+|final_norm|lm_head)\.")
_SUFFIX = " (bound of its scores)"
#: Tensors made of positions alone: rotary tables, masks.
NO_LAYER = "positions"
STATE = "state"
_FIRST = (NO_LAYER, STATE, "embed", "correction")
_LAST = ("final_norm", "lm_head")


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetRun:
    """What one run of a target gave, arrays [tokens].

    Attributes:
        scores: Logits against the reference's, [1, tokens].
        norms: Euclidean norms of the ``state`` that the head reads, of that of the ``reference`` and of their
            difference, ``error``, float64; empty for a model without one.
        non_finite: Steps that delivered a NaN or an infinity.
        first_non_finite: Step, position and tensor of the first of them; empty if there is none.
        wrong_position: The first next_position that is not what it should be, as a sentence; empty if there is none.
    """

    scores: Scores
    norms: Mapping[str, np.ndarray]
    non_finite: int
    first_non_finite: str
    wrong_position: str


def run_target(runner: Runner, setup: ParitySetup, schedule: Schedule, reference: Reference) -> TargetRun:
    """Decode the tokens and compare every step.

    Raises:
        ContractError: The graph cannot run.
    """
    config, tokens = setup.config, schedule.tokens
    decoding = _decoding(runner, schedule)
    scorer, watch = Scorer(reference, STEP, 1), _Watch(decoding)
    logits = np.empty((1, min(tokens, max(1, BLOCK_ELEMENTS // config.vocab_size)), config.vocab_size), np.float32)
    states = (
        np.empty((tokens, config.hidden_size), np.float32)
        if any(spec.name == HIDDEN for spec in config.carried.states)
        else None
    )
    first, everything = 0, slice(0, 1)
    label = f"{runner.target.name}: long run, {schedule.kind}"
    for step, position in _steps(decoding, schedule, reference.windows.inputs, setup.progress, label):
        watch.look(step, position)
        if step - first == logits.shape[1]:
            scorer.add(everything, first, logits)
            first = step
        logits[0, step - first] = decoding.logits()[0]
        if states is not None:
            states[step] = decoding.output("next_state")[0, 0]  # type: ignore[index]  # the state is an output
    scorer.add(everything, first, logits[:, : tokens - first])
    return TargetRun(
        scores=scorer.scores(),
        norms={} if states is None else _norms(states, reference.hidden(STEP, 0)[0].numpy()),
        non_finite=watch.count,
        first_non_finite=watch.first,
        wrong_position=watch.wrong_position,
    )


def _decoding(runner: Runner, schedule: Schedule) -> Decoding:
    return runner.decoding(1, schedule.capacity, windows_of_caches(runner.config.carried) if schedule.slides else None)


def _steps(
    decoding: Decoding, schedule: Schedule, ids: np.ndarray, progress: Progress, label: str
) -> Iterator[tuple[int, int]]:
    """Feed one row the tokens, int64 [1, tokens]; yields every step and its position in the cache when it is done."""
    (position,) = decoding.position
    for step in range(schedule.tokens):
        if step % _PROGRESS_STEPS == 0:
            progress(label, step, schedule.tokens)
        if position == schedule.window:
            decoding.empty_caches()
        try:
            decoding.step(ids[:, step])
        except ContractError as error:
            raise ContractError(f"{label}: step {step} at position {position}: {error}") from error
        (position,) = decoding.position
        yield step, position - 1
    progress(label, schedule.tokens, schedule.tokens)


class _Watch:
    """Looks at what every step wrote: cache entries, states, logits, next position."""

    def __init__(self, decoding: Decoding) -> None:
        carried = decoding.runner.config.carried
        self._decoding = decoding
        self._caches = [
            f"present_key_values.{i}.{kind}" for i in range(len(carried.caches)) for kind in ("key", "value")
        ]
        self._states = [spec.tensor(NEXT_STATE) for spec in carried.states]
        self.count, self.first, self.wrong_position = 0, "", ""

    def look(self, step: int, position: int) -> None:
        """Look at one step; tensors in the order the graph computes them, so the first bad one is named."""
        entries = {name: self._decoding.output(name) for name in (*self._caches, *self._states, "logits")}
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


def _norms(states: np.ndarray, expected: np.ndarray) -> dict[str, np.ndarray]:
    wide = states.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        parts = {"state": wide, "reference": expected.astype(np.float64), "error": wide - expected}
        return {name: np.linalg.norm(values, axis=1) for name, values in parts.items()}


@dataclass(frozen=True, kw_only=True)
class LongHeadroom:
    """Largest |value| by tensor, infinite where a value is NaN.

    Attributes:
        whole: Over the whole run, largest first.
        trained: At positions below the training length only.
        layers: Layer of every tensor, in the order of the model.
    """

    whole: Mapping[str, float]
    trained: Mapping[str, float]
    layers: Mapping[str, str]

    def by_layer(self, values: Mapping[str, float]) -> dict[str, float]:
        """Largest value per layer, in the order of the model."""
        largest: dict[str, float] = {}
        for tensor, layer in self.layers.items():
            if tensor in values:
                largest[layer] = max(largest.get(layer, 0.0), values[tensor])
        return largest


def observe_long_run(case: ParityCase, setup: ParitySetup, schedule: Schedule, ids: np.ndarray) -> LongHeadroom:
    """Run the observed step graph over the tokens, int64 [1, tokens].

    Raises:
        ContractError: The graph cannot be read or run, or the type of a tensor cannot be told.
    """
    engine = observing_engine(setup.runner(case), case, "step", setup.threads)
    decoding = _decoding(setup.runner(case).over(engine), schedule)
    trained: dict[str, float] = {}
    for step, _ in _steps(decoding, schedule, ids, setup.progress, f"{case.target}: FP16 values, {schedule.kind}"):
        if step == schedule.gated_tokens - 1:
            trained = engine.largest()
    whole = engine.largest()
    return LongHeadroom(
        whole=dict(sorted(whole.items(), key=lambda item: -item[1])),
        trained=trained,
        layers=layers_of_tensors(case.graphs["step"], list(whole)),
    )


def layers_of_tensors(path: Path, tensors: list[str]) -> dict[str, str]:
    """The layer that computes each observed tensor, in the order of the graph.

    Names of tensors do not say it, names of weights do: a node belongs to the layer of the weight it reads, else to the
    latest layer among the tensors it reads.

    Args:
        path: The graph.
        tensors: Names of tensors, or of nodes followed by what is observed of them.
    """
    scopes = {STATE: STATE}
    for node in onnx.load(path, load_external_data=False).graph.node:
        own = [match[1] for name in node.input if (match := _WEIGHT.match(name))]
        scope = max(own or [scopes.get(name, NO_LAYER) for name in node.input] or [NO_LAYER], key=_rank)
        scopes |= dict.fromkeys((*node.output, node.name), scope)
    layers = {name: scopes.get(name.removesuffix(_SUFFIX), NO_LAYER) for name in tensors}
    return dict(sorted(layers.items(), key=lambda item: _rank(item[1])))


def _rank(layer: str) -> tuple[int, int]:
    """Place in the model, from the token to the logits."""
    if layer in _FIRST:
        return 0, _FIRST.index(layer)
    if layer in _LAST:
        return 2, _LAST.index(layer)
    return 1, int(layer.rpartition(".")[2])
