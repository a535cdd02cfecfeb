"""An engine that counts the time inside its run calls: the benchmark's one hook into a session.

``Bundle`` takes any function that opens an engine, so nothing in the runtime knows about this.
"""

from __future__ import annotations

import time
from typing import Any, cast

from crt_export.bundle import BundleFiles
from crt_export.config import ModelConfig
from crt_export.engine.base import Engine, Launch
from crt_export.runtime.opening import Target, engine_from_target


class EngineClock:
    """Seconds spent inside run calls since the last take()."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        """The seconds since the last call of this."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def open_engine(self, files: BundleFiles, target: Target, config: ModelConfig, threads: int) -> Engine:
        """As the runtime opens an engine, with its run calls counted here."""
        engine = engine_from_target(files, target, config, threads)
        return cast(Engine, _TimedEngine(engine, self))


class _TimedEngine:
    """Passes everything on; its programs are timed."""

    def __init__(self, engine: Engine, clock: EngineClock) -> None:
        self._engine = engine
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def program(self, graph: str) -> _TimedProgram:
        return _TimedProgram(self._engine.program(graph), self._clock)


class _TimedProgram:
    """Passes everything on; its launches are timed."""

    def __init__(self, program: Any, clock: EngineClock) -> None:
        self._program = program
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def bind(self, *args: Any, **options: Any) -> Launch:
        launch, clock, now = self._program.bind(*args, **options), self._clock, time.perf_counter

        def timed() -> None:
            begin = now()
            launch()
            clock.seconds += now() - begin

        return timed
