"""A file that a user names, written whole or not at all: beside its place first, then renamed.

What was there stays until the new content is complete and on the disk. A link is followed: its target gets the new
content, and the link stays. A folder, a pipe, a socket or a device is never replaced by a file.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from crt_export.input_file import kind_of

#: Characters of the name that the file beside it shows; all of it might make a name that is too long.
_SHOWN_CHARACTERS = 16


def write_file(path: str | os.PathLike[str], content: bytes, *, mode: int = 0o666, streams: bool = False) -> None:
    """Write a file, force it to the disk, and give it its name.

    Args:
        path: A free name, a regular file, or a link to one of them.
        content: All of it.
        mode: Permissions of a new file, less the umask; a file that was there hands on its own.
        streams: Write to a pipe that is read, or to a character device such as a terminal, instead of refusing it.

    Raises:
        OSError: It cannot be written; what was at ``path`` is unchanged.
    """
    status = _status(path)
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    if status is not None and not stat.S_ISREG(status.st_mode):
        if streams and (stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)):
            _write_stream(path, content)
            return
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(code, f"it is {kind_of(status.st_mode)}, expected a file or a free name", os.fspath(path))
    place = Path(os.path.realpath(path))
    partial = place.with_name(f".{place.name[:_SHOWN_CHARACTERS]}.{secrets.token_hex(8)}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if status is not None:
            partial.chmod(stat.S_IMODE(status.st_mode) & 0o777)  # what was private stays so
        partial.replace(place)
    finally:
        with suppress(OSError):
            partial.unlink()
    _sync_folder(place.parent)


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What is there, links followed; None for a free name and for a link to one."""
    try:
        return Path(path).stat()
    except FileNotFoundError:
        return None
    except ValueError as error:  # a NUL byte, or characters that no file name can have
        raise OSError(errno.EINVAL, f"that is no name of a file ({error})", os.fspath(path)) from None


def _write_stream(path: str | os.PathLike[str], content: bytes) -> None:
    # Without O_NONBLOCK a pipe that nobody reads would wait for ever; with it, opening fails.
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    with os.fdopen(descriptor, "wb") as stream:
        os.set_blocking(stream.fileno(), True)
        stream.write(content)


def _sync_folder(folder: Path) -> None:
    """Make the rename last; not every file system can sync a folder."""
    if os.name != "posix":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
