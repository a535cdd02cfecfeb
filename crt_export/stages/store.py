"""Store of finished stages, so that the next build of the same checkpoint need not make them again.

::

    FOLDER/<stage>-<key>/entry.json    what the stage answered, size and SHA-256 of every file; a SHA-256 of that
                         files/...     the files, at their paths in the bundle

The key is a hash over everything the stage depends on (:func:`stage_key`). An entry appears in one rename, so that a
build that dies or runs beside another one leaves a whole entry or none. Every byte is hashed once when it is taken,
while it is copied into the bundle: a damaged entry is removed, with a note, and the stage runs as if there were none. A
folder that cannot be read or written is as good as an empty one. The entries used longest ago go when there are more
bytes than the limit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from crt_export import __version__, catalog
from crt_export.bundle.held import hash_file
from crt_export.bundle.paths import file_problem, name_problem
from crt_export.environment import installed_versions
from crt_export.errors import CrtExportError
from crt_export.folders import temporary_folder, user_cache
from crt_export.user_files import open_input, write_file

#: All entries together, in bytes: some four checkpoints of 160 million parameters with four targets each.
DEFAULT_LIMIT = 10 * 2**30
_ENTRY, _FILES, _UNFINISHED = "entry.json", "files", ".unfinished"
_BLOCK = 2**22
#: Of entry.json; those of real builds have some kilobytes.
_MOST_ENTRY_BYTES = 2**24
_LIBRARIES = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "tensorrt-rtx", "tensorrt",
)  # fmt: skip
#: What reading an answer of another kind raises.
_UNREADABLE = (CrtExportError, SafetensorError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Note = Callable[[str], None]
Result = TypeVar("Result")


def default_folder() -> Path | None:
    """``crt-export/stages`` in $XDG_CACHE_HOME or ~/.cache; None where there is no home folder."""
    return user_cache("stages")


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 over the name of a stage, its inputs (JSON values), this package and its libraries.

    Whatever changes in this package or in the libraries that make graphs and engines, nothing that was made before is
    found again.
    """
    return _digest({"stage": stage, "inputs": inputs, "code": code_identity()})


@functools.cache
def code_identity() -> str:
    """SHA-256 over every source file of the package, the contracts of the graphs, and versions of what it calls."""
    total = hashlib.sha256(f"{__version__} {platform.python_version()} {platform.machine()}\n".encode())
    total.update(json.dumps(installed_versions(_LIBRARIES), sort_keys=True).encode())
    for path in (*catalog.sources(), *catalog.definitions("graphs")):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


class _DamagedError(Exception):
    """An entry is there and is not what was stored."""


@dataclass(frozen=True, kw_only=True)
class StageStore:
    """Entries in one folder.

    Attributes:
        folder: Where they lie, made when the first one is stored; None keeps and finds nothing.
        note: Told in a sentence what is wrong with the folder; a build goes on without it.
        limit: Most bytes of all entries together.
    """

    folder: Path | None
    note: Note
    limit: int = DEFAULT_LIMIT

    def restore(self, stage: str, key: str, target: Path) -> dict[str, Any] | None:
        """:meth:`restore_as` with the answer as it was given."""
        return self.restore_as(stage, key, target, dict)

    def restore_as(self, stage: str, key: str, target: Path, read: Callable[[dict[str, Any]], Result]) -> Result | None:
        """Copy the files of an entry into ``target`` and read what the stage answered; None if there is none.

        Args:
            stage: What made it.
            key: Of :func:`stage_key`.
            target: Folder of the bundle; after None it holds none of the entry's files.
            read: Makes of the answer what the stage gives; called with the files in their places. An answer that it
                cannot read is as damaged as any other part of an entry.

        Raises:
            OSError: ``target`` cannot be written.
        """
        if self.folder is None:
            return None
        entry = self.folder / f"{stage}-{key}"
        if not os.path.lexists(entry):
            return None
        try:
            with ExitStack() as undo:
                document = _read_entry(entry)
                for name, expected in document["files"].items():
                    undo.callback((target / name).unlink, missing_ok=True)
                    _take(entry / _FILES / name, target / name, expected)
                try:
                    result = read(document["answer"])
                except _UNREADABLE as error:
                    raise _DamagedError(f"{_ENTRY} holds another kind of answer: {error}") from None
                undo.pop_all()
        except _DamagedError as error:
            self.note(f"stored {stage} is damaged ({error}): it is made again")
            _discard(entry)
            return None
        with suppress(OSError):
            os.utime(entry)  # used last
        return result

    def keep(
        self,
        stage: str,
        key: str,
        source: Path,
        files: Iterable[str],
        answer: Mapping[str, Any],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Store a copy of files of the bundle under ``source``, and what the stage answered (JSON values).

        Whatever goes wrong with the folder is noted and leaves no entry. ``digests`` are SHA-256 of files, by name,
        from whoever wrote them; others are hashed here.
        """
        if self.folder is None:
            return
        known, entry = digests or {}, self.folder / f"{stage}-{key}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with temporary_folder(self.folder, _UNFINISHED) as unfinished:
                listed = {}
                for name in files:
                    copy = unfinished / _FILES / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, copy)
                    digest = known.get(name) or hash_file(source / name)[0]
                    listed[name] = {"size": copy.stat().st_size, "sha256": digest}
                document = {"stage": stage, "key": key, "answer": answer, "files": listed}
                # The list goes to the disk; the files' content is hashed on reading.
                write_file(unfinished / _ENTRY, json.dumps({**document, "sha256": _digest(document)}).encode())
                unfinished.rename(entry)
            self._trim(entry)
        except OSError as error:
            if not entry.is_dir():  # otherwise another build was faster, with the same
                self.note(f"{stage} is not stored for later builds in {self.folder}: {error.strerror or error}")

    def _trim(self, newest: Path) -> None:
        """Remove the entries used longest ago beyond the limit, but never the newest."""
        entries: list[tuple[float, int, Path]] = []
        for path in newest.parent.iterdir():
            with suppress(OSError):  # another build removed it
                if not path.name.startswith("."):
                    size = sum(file.lstat().st_size for file in path.rglob("*"))
                    entries.append((path.lstat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total > self.limit and path != newest:
                _discard(path)
                total -= size


#: Keeps and finds nothing.
NO_STORE = StageStore(folder=None, note=lambda sentence: None)


def _read_entry(entry: Path) -> dict[str, Any]:
    try:
        if not stat.S_ISDIR(entry.lstat().st_mode):
            raise _DamagedError("it is no folder")
        with open_input(entry / _ENTRY, most=_MOST_ENTRY_BYTES, follow=False) as stream:
            document = json.loads(stream.read(_MOST_ENTRY_BYTES))
        known = isinstance(document, dict) and isinstance(document.get("files"), dict) and "answer" in document
        if not known or f"{document.get('stage')}-{document.get('key')}" != entry.name:
            raise _DamagedError(f"{_ENTRY} is not this entry's")
        if document.pop("sha256", None) != _digest(document):
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


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _take(stored: Path, target: Path, expected: Any) -> None:
    """Copy a stored file to a new one, hashing it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), expected.get("size") if isinstance(expected, dict) else None
    with target.open("xb") as stream:
        for block in _blocks(stored, size):
            digest.update(block)
            stream.write(block)
    if expected != {"size": size, "sha256": digest.hexdigest()}:
        raise _DamagedError(f"{stored.name} has other bytes than were stored")


def _blocks(stored: Path, size: int | None) -> Iterator[bytes]:
    """The content of a stored file: where the disk cannot read it, the entry is damaged and not the build."""
    try:
        with open_input(stored, follow=False) as stream:
            # The size first: a file that grew to terabytes would be copied before its hash could tell.
            if os.fstat(stream.fileno()).st_size != size:
                raise _DamagedError(f"{stored.name} has other bytes than were stored")
            while block := stream.read(_BLOCK):
                yield block
    except OSError as error:
        raise _DamagedError(f"{stored.name} cannot be read: {error.strerror}") from None


def _discard(entry: Path) -> None:
    """Take an entry, or whatever is called so, out of the way in one rename, so that nobody finds half of it."""
    with suppress(OSError), temporary_folder(entry.parent, _UNFINISHED) as removed:
        entry.rename(removed / entry.name)
