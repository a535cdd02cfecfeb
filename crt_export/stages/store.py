"""Keep what a stage made, so that the next build of the same checkpoint need not make it again.

::

    FOLDER/<stage>-<key>/entry.json    what the stage answered, size and SHA-256 of every file; a SHA-256 of that
                         files/...     the files, at their paths in the bundle

The key is a hash over everything the stage depends on (:mod:`crt_export.stages.keys`). An entry appears in one rename,
so that a build that dies or runs beside another one leaves a whole entry or none. Every byte is hashed again while it
is copied into the bundle: a damaged entry is removed, with a note, and the stage runs as if there were none. A folder
that cannot be read or written is as good as an empty one. The entries used longest ago go when there are more bytes
than the limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError

from crt_export.bundle.paths import file_problem, name_problem
from crt_export.errors import CrtExportError
from crt_export.user_files import open_input

#: All entries together, in bytes: some four checkpoints of 160 million parameters with four targets each.
DEFAULT_LIMIT = 10 * 2**30
_ENTRY, _FILES, _UNFINISHED = "entry.json", "files", ".unfinished-"
_BLOCK = 2**22
#: Of entry.json; those of real builds have some kilobytes.
_MOST_ENTRY_BYTES = 2**24
#: An unfinished entry this old is one that a killed build left.
_ABANDONED_SECONDS = 24 * 3600.0

Note = Callable[[str], None]
Result = TypeVar("Result")


def default_folder() -> Path | None:
    """``crt-export/stages`` in $XDG_CACHE_HOME or ~/.cache; None where there is no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification: a relative path is to be ignored.
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # no home folder can be told
        return None
    return base / "crt-export" / "stages"


class _DamagedError(Exception):
    """An entry is there and is not what was stored."""


@dataclass(frozen=True, kw_only=True)
class StageStore:
    """Entries in one folder.

    Attributes:
        folder: Where they lie, made when the first one is stored; None keeps and finds nothing.
        note: Told in a sentence what is wrong with the folder; a build goes on without it.
        limit: Most bytes of all entries together.
        found: Names of the entries that this object has restored.
    """

    folder: Path | None
    note: Note
    limit: int = DEFAULT_LIMIT
    found: list[str] = field(default_factory=list)

    def restore(self, stage: str, key: str, target: Path) -> dict[str, Any] | None:
        """:meth:`restore_as` with the answer as it was given."""
        return self.restore_as(stage, key, target, dict)

    def restore_as(self, stage: str, key: str, target: Path, read: Callable[[dict[str, Any]], Result]) -> Result | None:
        """Copy the files of an entry into ``target`` and read what the stage answered; None if there is none.

        Args:
            stage: What made it.
            key: Of :func:`crt_export.stages.keys.stage_key`.
            target: Folder of the bundle; after None it holds none of the entry's files.
            read: Makes of the answer what the stage gives; called with the files in their places. An answer that it
                cannot read is as damaged as any other part of an entry.

        Raises:
            OSError: ``target`` cannot be written.
        """
        if self.folder is None:
            return None
        entry = self.folder / f"{stage}-{key}"
        try:
            document = _read_entry(entry)
            if document is None:
                return None
            with ExitStack() as undo:
                _copy_verified(entry, document["files"], target, undo)
                result = _read_answer(read, document["answer"])
                undo.pop_all()
        except _DamagedError as error:
            self.note(f"stored {stage} is damaged ({error}): it is made again")
            _discard(entry)
            return None
        with suppress(OSError):
            os.utime(entry)  # used last
        self.found.append(entry.name)
        return result

    def keep(self, stage: str, key: str, source: Path, files: Iterable[str], answer: Mapping[str, Any]) -> None:
        """Store a copy of files of the bundle under ``source``, and what the stage answered (JSON values).

        Whatever goes wrong with the folder is noted and leaves no entry.
        """
        if self.folder is None:
            return
        entry = self.folder / f"{stage}-{key}"
        unfinished: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
            listed = {name: _copy_hashed(source / name, unfinished / _FILES / name) for name in files}
            document = {"stage": stage, "key": key, "answer": answer, "files": listed}
            _write_synced(unfinished / _ENTRY, {**document, "sha256": _document_digest(document)})
            unfinished.rename(entry)
            self._trim(entry)
        except OSError as error:
            if not entry.is_dir():  # otherwise another build was faster, with the same
                self.note(f"{stage} is not stored for later builds in {self.folder}: {error.strerror or error}")
        finally:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _trim(self, newest: Path) -> None:
        """Remove what killed builds left, and the entries used longest ago beyond the limit, but never the newest."""
        assert self.folder is not None
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another build removed it
                used = path.lstat().st_mtime
                if not path.name.startswith("."):
                    entries.append((used, _size(path), path))
                elif time.time() - used > _ABANDONED_SECONDS:
                    _remove(path)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                return
            if path != newest:
                _discard(path)
                total -= size


#: Keeps and finds nothing.
NO_STORE = StageStore(folder=None, note=lambda sentence: None)


def _read_entry(entry: Path) -> dict[str, Any] | None:
    if not os.path.lexists(entry):
        return None
    try:
        if not stat.S_ISDIR(entry.lstat().st_mode):
            raise _DamagedError("it is no folder")
        with open_input(entry / _ENTRY, most=_MOST_ENTRY_BYTES, follow=False) as stream:
            content = stream.read(_MOST_ENTRY_BYTES)
        document = json.loads(content)
        known = isinstance(document, dict) and isinstance(document.get("files"), dict) and "answer" in document
        if not known or f"{document.get('stage')}-{document.get('key')}" != entry.name:
            raise _DamagedError(f"{_ENTRY} is not this entry's")
        if document.pop("sha256", None) != _document_digest(document):
            raise _DamagedError(f"{_ENTRY} has other values than were stored")
    except OSError as error:
        raise _DamagedError(f"{_ENTRY} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, nested too deeply
        raise _DamagedError(f"{_ENTRY} cannot be read: {error}") from None
    for name in document["files"]:
        problem = name_problem(name) or file_problem(entry / _FILES, name)
        if problem:
            raise _DamagedError(f"{name} {problem}")
    return document


def _document_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _copy_verified(entry: Path, files: Mapping[str, Any], target: Path, undo: ExitStack) -> None:
    """Copy every file; ``undo`` removes them."""
    for name, expected in files.items():
        try:
            source = open_input(entry / _FILES / name, follow=False)
        except OSError as error:
            raise _DamagedError(f"{name} cannot be read: {error.strerror}") from None
        with source:
            # The size first: a file that grew to terabytes would be copied before its hash could tell.
            size = os.fstat(source.fileno()).st_size
            if not isinstance(expected, dict) or expected.get("size") != size:
                raise _DamagedError(f"{name} has other bytes than were stored")
            undo.callback((target / name).unlink, missing_ok=True)
            if _copy(_Readable(source, name), target / name) != expected:
                raise _DamagedError(f"{name} has other bytes than were stored")


@dataclass(frozen=True)
class _Readable:
    """A stored file: where the disk cannot read it, the entry is damaged and not the build."""

    stream: BinaryIO
    name: str

    def read(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except OSError as error:
            raise _DamagedError(f"{self.name} cannot be read: {error.strerror}") from None


def _read_answer(read: Callable[[dict[str, Any]], Result], answer: Any) -> Result:
    try:
        return read(answer)
    except (
        CrtExportError,
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise _DamagedError(f"{_ENTRY} holds another kind of answer: {error}") from None


def _copy_hashed(source: Path, target: Path) -> dict[str, Any]:
    with source.open("rb") as stream:
        return _copy(stream, target)


def _copy(source: BinaryIO | _Readable, target: Path) -> dict[str, Any]:
    """Copy an open file to a new one; size and SHA-256 of what was copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as stream:
        while block := source.read(_BLOCK):
            digest.update(block)
            stream.write(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _write_synced(path: Path, document: Mapping[str, Any]) -> None:
    """The list of files goes to the disk first; their content is hashed on reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as stream:
        json.dump(document, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _discard(entry: Path) -> None:
    """Take an entry out of the way in one rename, so that nobody finds half of it, then remove it."""
    removed = entry.with_name(f"{_UNFINISHED}{os.getpid()}-{entry.name}")
    with suppress(OSError):
        entry.rename(removed)
    _remove(removed)


def _remove(path: Path) -> None:
    """Remove a folder and what is in it, or whatever else is called so; nobody needs it."""
    with suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _size(entry: Path) -> int:
    return sum(path.lstat().st_size for path in entry.rglob("*"))
