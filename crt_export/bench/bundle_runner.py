"""A target of a bundle as a candidate, through the API that applications use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from crt_export.bench.runner import CandidateInfo, Passes, StepTimes, block_start, prompt_rows
from crt_export.bench.step_cost import weights_from_graph
from crt_export.bundle import BundleFiles, open_bundle
from crt_export.engine.base import Engine, Launch
from crt_export.models.declaration import ModelInfo
from crt_export.runtime import Session, Snapshot
from crt_export.runtime.bundle import Bundle
from crt_export.runtime.opening import Target, engine_from_target, model_from_manifest, target_from_manifest


class BundleRunner:
    """Sessions of one target; see :class:`crt_export.bench.runner.Runner`."""

    def __init__(self, path: Path, target: str, *, batch: int, threads: int | None, text: Sequence[int] = ()) -> None:
        """Read the manifest and import the target's runtime; nothing is opened yet.

        Args:
            path: The bundle.
            target: One of its targets.
            batch: Rows.
            threads: CPU threads; None takes the target's.
            text: Token ids that prompts are made of; none: random ones.

        Raises:
            BundleError, InputError: There is no such bundle or target.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        self._path, self._batch, self._threads, self._text = path, batch, threads, text
        files = open_bundle(path, allow_unvalidated=True)
        self._target = target_from_manifest(files, target, model_from_manifest(files))
        self._weights = weight_path(files, self._target)
        if not self._target.profile.compiled:
            from crt_export.engine.ort import import_onnxruntime

            import_onnxruntime(self._target.profile.device)
        self._clock = EngineClock()
        self._bundle: Bundle | None = None
        self._session: Session | None = None
        self._snapshots: dict[int, Snapshot] = {}

    def weight_path(self) -> Path | None:
        return self._weights

    def open(self) -> None:
        files = open_bundle(self._path, allow_unvalidated=True)
        self._bundle = Bundle(files, self._clock.open_engine)
        self._session = self._new_session()

    def first_token(self) -> None:
        self._opened().step([0] * self._batch)

    def info(self) -> CandidateInfo:
        assert self._bundle is not None
        files, notes = self._bundle.files, []
        if not files.manifest["validated"]:
            notes.append(f"{files.path.name} is not validated: its agreement with PyTorch was never shown")
        if self._batch > 1 and not self._target.rows_are_independent:
            notes.append(
                f"{self._target.name} runs each row alone, so a step of {self._batch} rows reads the weights that often"
            )
        graph = self._target.graphs.get("step")
        return CandidateInfo(
            weight_file=None if self._weights is None else self._weights.stat().st_size,
            weights=None if graph is None else weights_from_graph(files.file(graph)).bytes_read(self._batch),
            notes=tuple(notes),
        )

    def steps(self, position: int, warmups: int, count: int) -> StepTimes:
        session, start = self._opened(), block_start(position, warmups)
        self._go_to(start)
        if position - start < warmups:  # too few tokens before the position to warm up on the way to it
            self._timed(session, warmups)
            self._go_to(start)
        self._timed(session, position - start)
        return self._timed(session, count)

    def prefill(self, tokens: int, passes: Passes) -> float:
        session, prompt = self._opened(), self._prompt(tokens)
        session.reset()
        # The public type of passes is widened where adaptive and exact prefill live.
        options: dict[str, Any] = {} if passes is None else {"passes": passes}
        begin = time.perf_counter()
        session.prefill(prompt, **options)
        return time.perf_counter() - begin

    def open_second_session(self) -> None:
        self._second = self._new_session()
        self._second.step([0] * self._batch)

    def close_second_session(self) -> None:
        self._second.close()
        del self._second

    def close(self) -> None:
        if self._bundle is not None:
            self._bundle.close()

    def _opened(self) -> Session:
        assert self._session is not None
        return self._session

    def _new_session(self) -> Session:
        assert self._bundle is not None
        return self._bundle.session(self._target.name, batch=self._batch, threads=self._threads)

    def _prompt(self, tokens: int) -> list[np.ndarray]:
        assert self._bundle is not None
        model, batch = self._bundle.model, self._batch
        return list(prompt_rows(self._text, model.vocab_size, batch=batch, tokens=tokens, bos=model.bos_token_id))

    def _go_to(self, position: int) -> None:
        """Hold this many tokens, the same ones every time."""
        session = self._opened()
        if position == 0:
            session.reset()
        elif position in self._snapshots:
            session.restore(self._snapshots[position])
        else:
            session.reset()
            session.prefill(self._prompt(position))
            self._snapshots[position] = session.snapshot()

    def _timed(self, session: Session, count: int) -> StepTimes:
        """Run steps, each on the likeliest token after the one before; a step of a greedy loop is what is timed."""
        seconds, engine, now = [], [], time.perf_counter
        tokens = np.maximum(session.next_tokens, 0)  # -1 where there is no token yet
        for _ in range(count):
            self._clock.take()
            begin = now()
            session.step(tokens)
            tokens = session.next_tokens
            seconds.append(now() - begin)
            engine.append(self._clock.take())
        return StepTimes(seconds=seconds, engine=engine)


def weight_path(files: BundleFiles, target: Target) -> Path | None:
    """The file that a target's step reads its weights from; None where the manifest names none."""
    entry = files.manifest["targets"][target.name]
    if target.profile.compiled:
        name = entry["engines"].get("step")
    else:
        name = next((g["weights"] for g in files.manifest["graphs"] if g["file"] == target.graphs.get("step")), None)
    return None if name is None else files.path / name


class EngineClock:
    """Seconds spent inside run calls since the last take()."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        """The seconds since the last call of this."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def open_engine(self, files: BundleFiles, target: Target, model: ModelInfo, threads: int) -> Engine:
        """As the runtime opens an engine, with its run calls counted here."""
        return cast(Engine, _Timed(engine_from_target(files, target, model, threads), self))


class _Timed:
    """An engine or one of its programs; passes everything on, and times launches."""

    def __init__(self, wrapped: Any, clock: EngineClock) -> None:
        self._wrapped, self._clock = wrapped, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def program(self, graph: str) -> _Timed:
        return _Timed(self._wrapped.program(graph), self._clock)

    def bind(self, *args: Any, **options: Any) -> Launch:
        launch, clock, now = self._wrapped.bind(*args, **options), self._clock, time.perf_counter

        def timed() -> None:
            begin = now()
            launch()
            clock.seconds += now() - begin

        return timed
