"""An opened bundle: the model's configuration, its tokenizer, and sessions on its targets."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Any

from crt_export.bundle import BundleFiles, open_bundle
from crt_export.config import ModelConfig
from crt_export.engine.base import Engine
from crt_export.errors import InputError, UnsupportedError
from crt_export.runtime.opening import Target, config_from_manifest, engine_from_target, target_from_manifest
from crt_export.runtime.session import Session
from crt_export.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer


class Bundle:
    """A bundle that is open for running. Made by :func:`load_bundle`; closes its sessions when it is closed.

    Sessions of the same target and thread count share the loaded graphs, weights and threads.
    """

    def __init__(self, files: BundleFiles) -> None:
        """Read the configuration; nothing is loaded yet."""
        self._files = files
        self._config = config_from_manifest(files)
        self._tokenizer: Tokenizer | None = None
        self._engines: dict[tuple[str, int], Engine] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def files(self) -> BundleFiles:
        """The checked files of the bundle."""
        return self._files

    @property
    def manifest(self) -> dict[str, Any]:
        """The checked manifest; treat it as read-only."""
        return self._files.manifest

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._config

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets this bundle was built for."""
        return tuple(self.manifest["targets"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read on first use.

        Raises:
            MissingDependencyError: It needs the ``tokenizers`` library, which is not installed.
            BundleError: Its file is missing or differs from what was built.
        """
        if self._tokenizer is None:
            if self._config.tokenizer == TOKENIZER_FILE:
                self._files.file(TOKENIZER_FILE)
            self._tokenizer = load_tokenizer(self._files.path, self._config)
        return self._tokenizer

    def target(self, name: str) -> Target:
        """What the manifest says about one target.

        Raises:
            InputError: The bundle has no such target.
        """
        return target_from_manifest(self._files, name, self._config)

    def default_target(self) -> str:
        """The first target of the bundle that a session of this version can run on a CPU, else on a GPU.

        Raises:
            UnsupportedError: It has none.
        """
        targets = [self.target(name) for name in self.targets]
        runnable = [target for target in targets if target.runs_here]
        runnable.sort(key=lambda target: target.profile.device != "cpu")
        if not runnable:
            raise UnsupportedError(
                f"{self._files.path} has no target that the Python runtime runs, only "
                f"{', '.join(self.targets) or 'none at all'}; build it with --target ort-cpu-fp32"
            )
        return runnable[0].name

    def session(self, target: str, batch: int = 1, threads: int | None = None, capacity: int | None = None) -> Session:
        """Open a session on a target.

        Args:
            target: One of ``targets``.
            batch: Number of rows.
            threads: CPU threads, 0 for every core; None takes the profile's.
            capacity: Most tokens a row can hold; None takes the target's. Attention costs by capacity, so ask
                for what is needed.

        Raises:
            InputError: The bundle is closed, the target unknown, or a number is out of its range.
            UnsupportedError: The target's runtime has no Python session in this version.
            MissingDependencyError: The runtime or its device is absent.
            BundleError: A file is missing or differs from what was built.
            ContractError: A graph cannot be loaded or breaks the contract.
        """
        with self._lock:
            if self._closed:
                raise InputError("this bundle is closed; open it again with load_bundle()")
            chosen = self.target(target)
            rows = _number("batch", batch, least=1)
            count = chosen.profile.threads if threads is None else _number("threads", threads, least=0)
            limit = self._config.max_position_embeddings
            size = chosen.capacity if capacity is None else _number("capacity", capacity, least=1, most=limit)
            engine = self._engine(chosen, count)
            _check_limits(chosen, engine, rows, size)
            sizes = chosen.sizes(self._config, rows, size)
            session = Session(engine, sizes, target=target, eos_token_id=self._config.eos_token_id)
            self._sessions.add(session)
            return session

    def close(self) -> None:
        """Close every session and release the engines; closing twice is harmless."""
        with self._lock:
            self._closed = True
            for session in list(self._sessions):
                session.close()
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _engine(self, target: Target, threads: int) -> Engine:
        key = (target.name, threads)
        if key not in self._engines:
            self._engines[key] = engine_from_target(self._files, target, self._config, threads)
        return self._engines[key]


def load_bundle(path: str | os.PathLike[str], allow_unvalidated: bool = False) -> Bundle:
    """Open a bundle to run it.

    Args:
        path: The bundle folder.
        allow_unvalidated: Also open a bundle whose agreement with PyTorch was never shown.

    Returns:
        The bundle; use it as a context manager, or call its close().

    Raises:
        BundleError: There is no bundle, it is unfinished, damaged, too new, or unvalidated.
    """
    return Bundle(open_bundle(path, allow_unvalidated=allow_unvalidated))


def _number(name: str, value: int, *, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} must be a whole number, found {value!r}")
    number = value.__index__()
    if number < least or (most is not None and number > most):
        upper = f" and at most {most} (the model's max_position_embeddings)" if most is not None else ""
        raise InputError(f"{name} must be at least {least}{upper}, found {number}")
    return number


def _check_limits(target: Target, engine: Engine, batch: int, capacity: int) -> None:
    if engine.fixed_capacity is not None and capacity != engine.fixed_capacity:
        raise InputError(f"{target.name} was compiled for a capacity of {engine.fixed_capacity}, found {capacity}")
    if engine.max_batch is not None and batch > engine.max_batch:
        raise InputError(f"{target.name} was compiled for a batch of at most {engine.max_batch}, found {batch}")
