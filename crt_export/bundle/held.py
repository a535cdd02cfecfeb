"""A folder and its files that are held open: what was hashed is what is read, whoever renames or removes it meanwhile.

A name may lead to another file a moment later: a build exchanges two folders, a copy replaces a file. So a bundle's
folder is opened once, every file is opened below that descriptor, and whoever reads a file reads the descriptor that
was hashed. Where the system has no such calls (Windows), a file is opened by its path, hashed and read in one go.
"""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from crt_export.bundle.paths import FileState, Tree, file_problem, file_state, list_tree
from crt_export.errors import BundleError
from crt_export.user_files import open_regular

#: Whether files can be opened below a folder that is held open.
HOLDS_FOLDERS = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_PIECE = 1 << 20


class HeldFile:
    """A regular file that is open for reading; closed with :meth:`close` or when nobody holds it any more."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor."""
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)

    def state(self) -> FileState:
        """What ``fstat`` says now."""
        return file_state(os.fstat(self.descriptor))

    def reader(self) -> io.BufferedReader:
        """The content from its beginning; readers of one file do not disturb each other."""
        return io.BufferedReader(_Positions(self.descriptor), 1 << 16)

    def digest(self) -> tuple[str, FileState]:
        """SHA-256 of the content, lower-case hex, and the state that it had all the while.

        Raises:
            OSError: It cannot be read, or changed while it was read (ESTALE).
        """
        before = self.state()
        with self.reader() as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if self.state() != before:
            raise OSError(errno.ESTALE, "changed while it was read")
        return digest, before


class HeldFolder:
    """A folder that is held open where the system can; ``path`` is where it was found."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: It cannot be opened or is no folder.
        """
        self.path = path
        self.descriptor = os.open(path, _FOLDER_FLAGS) if HOLDS_FOLDERS else None
        self.close = weakref.finalize(self, _close, self.descriptor)

    @property
    def exchanged(self) -> bool:
        """Whether ``path`` leads to another folder by now, or nowhere."""
        if self.descriptor is None:
            return False
        try:
            now = self.path.stat()
        except OSError:
            return True
        return not os.path.samestat(now, os.fstat(self.descriptor))

    def problem(self, name: str) -> str | None:
        """Why ``name``, a valid one, is no regular file reached through no link; None if it is."""
        return file_problem(self.path, name, self.descriptor)

    def state(self, name: str) -> FileState:
        """The file that ``name`` leads to now; raises OSError."""
        if self.descriptor is None:
            return file_state(os.lstat(self.path / name))
        return file_state(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False))

    def open_file(self, name: str) -> int:
        """A descriptor of a regular file, through no link; raises OSError."""
        if self.descriptor is None:
            return open_regular(self.path / name)
        *folders, last = name.split("/")
        opened: list[int] = []
        try:
            for part in folders:
                above = opened[-1] if opened else self.descriptor
                opened.append(os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=above))
            return open_regular(last, dir_fd=opened[-1] if opened else self.descriptor)
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def tree(self) -> Tree:
        """Everything in it, links not followed; raises OSError."""
        return list_tree(self.path, self.descriptor)

    @property
    def way_in(self) -> Path:
        """A path by which this process reaches this very folder; on Linux whatever its name is by now."""
        if self.descriptor is not None:
            held = Path(f"/proc/self/fd/{self.descriptor}")
            if held.is_dir():
                return held
        return self.path


class _Positions(io.RawIOBase):
    """Reads a descriptor with a position of its own; never closes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        if hasattr(os, "preadv"):
            count = os.preadv(self._descriptor, [view], self._position)
        else:  # Windows and some others: such a file is not shared, see the module
            os.lseek(self._descriptor, self._position, os.SEEK_SET)
            content = os.read(self._descriptor, len(view))
            count = len(content)
            view[:count] = content
        self._position += count
        return count


def hash_file(path: Path, *, sync: bool = False, known: str | None = None) -> tuple[str, FileState]:
    """SHA-256 of a regular file.

    Args:
        path: The file; a link as its last component is refused.
        sync: Also force the content to the disk (``fsync``).
        known: The digest, from whoever wrote the file: its content is not read then.

    Returns:
        The digest in lower-case hex, and the state of the very file that was hashed.

    Raises:
        OSError: The file cannot be read, or changed while it was read (ESTALE).
    """
    held = HeldFile(open_regular(path))
    try:
        found = held.digest() if known is None else (known, held.state())
        if sync and os.name == "posix":
            os.fsync(held.descriptor)
    finally:
        held.close()
    if sync and os.name != "posix":  # Windows only syncs files that are open for writing
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    return found


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class HeldWeights:
    """A weight file whose content was compared with the manifest.

    Attributes:
        path: What messages call it.
        file: The open file.
        state: What ``fstat`` said while it was hashed.
        sha256: Digest of the content, lower-case hex.
    """

    path: Path
    file: HeldFile
    state: FileState
    sha256: str

    @property
    def unchanged(self) -> bool:
        """Whether the file is as it was hashed; a rename or a removal, which leave the content, count as changes."""
        return self.file.state() == self.state

    def private_copy(self) -> mmap.mmap:
        """The content in memory of this process, hashed as it was read.

        Raises:
            BundleError: It is no longer what the manifest says.
        """
        content = mmap.mmap(-1, max(1, self.state.size))
        digest = hashlib.sha256()
        try:
            with self.file.reader() as stream, memoryview(content) as view:
                for begin in range(0, self.state.size, _PIECE):
                    piece = view[begin : min(begin + _PIECE, self.state.size)]
                    if stream.readinto(piece) != len(piece):
                        raise OSError(errno.ESTALE, "became shorter")
                    digest.update(piece)
                    piece.release()
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read ({error.strerror})") from error
        if digest.hexdigest() != self.sha256:
            raise BundleError(f"{self.path} was changed while it was loaded; restore the bundle or build it again")
        return content


@dataclass(frozen=True, kw_only=True)
class HeldGraph:
    """A checked graph.

    Attributes:
        path: What messages call it.
        model: Content of the .onnx file, the very bytes that were hashed and searched.
        folder: Where the locations of its weights are looked up; leads to the held folder, not to its name.
        weights: Location in the graph to weight file.
    """

    path: Path
    model: bytes
    folder: Path
    weights: Mapping[str, HeldWeights]

    @property
    def unchanged(self) -> bool:
        """Whether every weight file is as it was hashed."""
        return all(weights.unchanged for weights in self.weights.values())
