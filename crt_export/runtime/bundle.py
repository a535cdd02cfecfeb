"""An opened bundle: the model's configuration, its tokenizer, and sessions on its targets."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from crt_export.bundle import BundleFiles, open_bundle
from crt_export.checked import shown, whole_number
from crt_export.engine.base import Engine
from crt_export.errors import BundleError, InputError, UnsupportedError
from crt_export.exclusive import Exclusive
from crt_export.models.declaration import Carried, ModelInfo
from crt_export.profile import MOST_THREADS
from crt_export.runtime.caches import TensorSizes
from crt_export.runtime.decoder import Decoder
from crt_export.runtime.opening import Target, engine_from_target, model_from_manifest, target_from_manifest
from crt_export.runtime.session import Session, SessionInfo
from crt_export.runtime.slide import Window, windows_of_caches
from crt_export.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

#: Loads the graphs of a target: files, target, model, threads.
OpenEngine = Callable[[BundleFiles, Target, ModelInfo, int], Engine]


class Bundle:
    """A bundle that is open for running. Made by :func:`load_bundle`; closes its sessions when it is closed.

    Sessions of the same target and thread count share the loaded graphs, their weights and their threads, so a
    further session costs its own tensors only. They may run in different threads at the same time.
    """

    def __init__(
        self, files: BundleFiles, open_engine: OpenEngine = engine_from_target, *, close_files: bool = False
    ) -> None:
        """Read the model's declaration; nothing is loaded yet.

        Args:
            files: The checked files.
            open_engine: Loads the graphs of a target.
            close_files: Whether closing the bundle closes the files too.
        """
        self._close_files = close_files
        self._files = files
        self._open_engine = open_engine
        self._model = model_from_manifest(files)
        self._tokenizer: Tokenizer | None = None
        self._engines: dict[tuple[str, int], Engine] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._exclusive = Exclusive("this bundle")
        self._closed = False

    @property
    def files(self) -> BundleFiles:
        """The checked files of the bundle."""
        return self._files

    @property
    def identity(self) -> str:
        """SHA-256 of ``manifest.json``, hex: the same for copies of a bundle, another for every other bundle."""
        return self._files.identity

    @property
    def manifest(self) -> dict[str, Any]:
        """The checked manifest; treat it as read-only."""
        return self._files.manifest

    @property
    def model(self) -> ModelInfo:
        """The model: its sizes, tokens, states and caches."""
        return self._model

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
            content = self._files.content(TOKENIZER_FILE) if self._model.tokenizer == TOKENIZER_FILE else None
            self._tokenizer = load_tokenizer(self._files.path, self._model, content)
        return self._tokenizer

    def target(self, name: str) -> Target:
        """What the manifest says about one target.

        Raises:
            InputError: The bundle has no such target.
        """
        return target_from_manifest(self._files, name, self._model)

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

    def session(
        self,
        target: str,
        batch: int = 1,
        threads: int | None = None,
        capacity: int | None = None,
        on_full: str = "error",
    ) -> Session:
        """Open a session on a target.

        Args:
            target: One of ``targets``.
            batch: Number of rows.
            threads: CPU threads, at most 1024, 0 for every core; None takes the profile's.
            capacity: Most tokens a row can hold; None takes the target's. On a GPU attention costs by capacity, so ask
                for what is needed; on a CPU it costs by the longest row.
            on_full: What happens to a row whose tokens exceed the capacity: ``error`` refuses them. ``evict``,
                for models with an attention window, forgets what the window no longer sees, see
                :mod:`crt_export.runtime.caches`; ``position`` then counts what is left in the cache. Needs a capacity
                of the window, of 9/8 of it on a target with float16 caches.

        Raises:
            InputError: The bundle is closed, the target unknown, a number out of its range, more rows than memory
                holds, or ``evict`` for a model without attention window or with too small a capacity.
            UnsupportedError: The target's runtime has no Python session in this version.
            MissingDependencyError: The runtime or its device is absent.
            BundleError: A file is missing or differs from what was built.
            ContractError: A graph cannot be loaded or breaks the contract.
        """
        return self._exclusive.wait(self._open_session, target, batch, threads, capacity, on_full)

    def close(self) -> None:
        """Close every session, waiting for calls that run, and release the engines; closing twice is harmless.

        A close that was interrupted is taken up by the next one.

        Raises:
            InputError: A call of this bundle or of one of its sessions runs in this very thread.
        """
        self._exclusive.wait(self._refuse_sessions)
        for session in list(self._sessions):
            session.close()
        for key, engine in list(self._engines.items()):
            engine.close()
            self._engines.pop(key, None)
        if self._close_files:
            self._files.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_session(
        self, target: str, batch: int, threads: int | None, capacity: int | None, on_full: str
    ) -> Session:
        if self._closed:
            raise InputError("this bundle is closed; open it again with load_bundle()")
        chosen = self.target(target)
        rows = whole_number("batch", batch)
        count = chosen.profile.threads
        if threads is not None:
            count = whole_number("threads", threads, least=0, most=MOST_THREADS)
        size = chosen.capacity if capacity is None else _checked_capacity(chosen, capacity)
        windows = _checked_windows(on_full, self._model.carried, size, chosen.cache_dtype)
        engine = self._engine(chosen, count)
        _check_limits(chosen, engine, rows, size)
        sizes = chosen.sizes(self._model, rows, size)
        info = SessionInfo(
            bundle=self._files.identity,
            target=target,
            eos_token_ids=self._model.eos_token_ids,
            tokenizer=lambda: None if self._model.tokenizer == "none" else self.tokenizer,
            reopen=lambda: self.session(target, rows, count, size, on_full),
        )
        session = Session(_decoder(engine, sizes, chosen, windows), info)
        self._sessions.add(session)
        return session

    def _refuse_sessions(self) -> None:
        self._closed = True

    def _engine(self, target: Target, threads: int) -> Engine:
        key = (target.name, 0 if target.profile.compiled else threads)  # compiled engines have no CPU threads
        if key not in self._engines:
            self._engines[key] = self._open_engine(self._files, target, self._model, threads)
        return self._engines[key]


def load_bundle(path: str | os.PathLike[str], allow_unvalidated: bool = False, identity: str | None = None) -> Bundle:
    """Open a bundle to run it.

    Args:
        path: The bundle folder.
        allow_unvalidated: Also open a bundle whose agreement with PyTorch was never shown.
        identity: The :attr:`Bundle.identity` that it must have, as ``crt-export inspect`` prints it; None takes any.

    Returns:
        The bundle; use it as a context manager, or call its close().

    Raises:
        BundleError: There is no bundle, it is unfinished, damaged, too new, unvalidated, or another one than
            ``identity`` says.
        InputError: ``allow_unvalidated`` is neither True nor False.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise BundleError(f"expected the path of a bundle folder, found {shown(path)}")
    if not isinstance(allow_unvalidated, bool):
        raise InputError(f"allow_unvalidated must be True or False, found {shown(allow_unvalidated)}")
    files = open_bundle(path, allow_unvalidated=allow_unvalidated, identity=identity)
    return Bundle(files, close_files=True)


def _decoder(engine: Engine, sizes: TensorSizes, target: Target, windows: tuple[Window, ...] | None) -> Decoder:
    try:
        return Decoder(
            engine,
            sizes,
            target=target.name,
            windows=windows,
            rows_are_independent=target.rows_are_independent,
            plan=target.prefill,
        )
    except (MemoryError, ValueError) as error:  # numpy's words for too much and for far too much
        raise InputError(
            f"batch {sizes.batch} x capacity {sizes.capacity} needs more memory than there is ({error}); "
            "open the session with a smaller batch or capacity"
        ) from error


def _checked_capacity(target: Target, capacity: int) -> int:
    built = f" (what {target.name} was built for; a build with a larger --capacity has more room)"
    return whole_number("capacity", capacity, most=target.capacity, limit=built)


def _check_limits(target: Target, engine: Engine, batch: int, capacity: int) -> None:
    if engine.fixed_capacity is not None and capacity != engine.fixed_capacity:
        raise InputError(f"{target.name} was compiled for a capacity of {engine.fixed_capacity}, found {capacity}")
    if engine.max_batch is not None and batch > engine.max_batch:
        raise InputError(f"{target.name} was compiled for a batch of at most {engine.max_batch}, found {batch}")


def _checked_windows(on_full: str, carried: Carried, capacity: int, cache_dtype: str) -> tuple[Window, ...] | None:
    """What rows evict, per cache; None where they do not."""
    if not isinstance(on_full, str) or on_full not in ("error", "evict", "slide"):  # slide: an older word for evict
        raise InputError(f"on_full must be 'error' or 'evict', found {shown(on_full)}")
    if on_full == "error":
        return None
    windows = windows_of_caches(carried)
    if windows is None:
        raise InputError(
            "on_full='evict' needs a model with an attention window; this one's tokens see all earlier ones, or know "
            "where they stand (its config has no sliding_window, or learned positions): use on_full='error'"
        )
    window = windows[0]
    least = window.least_capacity(cache_dtype)
    if capacity < least:
        more = " and an eighth more, since keys are rounded to float16 at every eviction" if least > window.size else ""
        raise InputError(
            f"on_full='evict' needs a capacity of at least {least}, the attention window of {window.size}{more}; "
            f"found {capacity}"
        )
    return windows
