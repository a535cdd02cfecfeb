"""Files that a user names: read only where they are regular files, written whole or not at all.

A pipe would wait for ever for a writer, a device need not end, and a file that is far too large would fill the memory
before anybody could say what is wrong with it. What is decided, is decided on the descriptor that is then read; links
are followed unless the caller says otherwise. Whoever calls turns the OSError into a sentence about the file; its
``strerror`` says what was found.

A file is written beside its place first, forced to the disk, then renamed: what was there stays until the new content
is complete. A link is followed: its target gets the new content, and the link stays. A folder, a pipe, a socket or a
device is never replaced by a file.

Nothing of the package is imported here, so that everything may import it.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import ExitStack, suppress
from importlib.resources.abc import Traversable
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
#: Characters of the name that the file beside it shows; all of it might make a name that is too long.
_SHOWN_CHARACTERS = 16


def open_input(path: str | os.PathLike[str], *, most: int | None = None, follow: bool = True) -> BufferedReader:
    """Open a regular file for reading, unbuffered bytes aside as :func:`open` does.

    Args:
        path: The file.
        most: Bytes it may have; None for any number.
        follow: Whether a link is followed; if not, it is refused (ELOOP).

    Raises:
        OSError: It cannot be opened, is no regular file (EINVAL, EISDIR), or has more bytes (EFBIG); ``strerror`` says
            which, ready for a message.
    """
    try:
        if follow:
            _refuse_other_kinds(path, Path(path).stat())  # opening a device or a pipe may do something already
        stream = os.fdopen(open_regular(path, follow=follow), "rb")
    except ValueError as error:  # a NUL byte, or characters that no file name can have
        raise OSError(errno.EINVAL, f"that is no name of a file ({error})", os.fspath(path)) from None
    with ExitStack() as unless_returned:
        unless_returned.callback(stream.close)
        size = os.fstat(stream.fileno()).st_size
        if most is not None and size > most:
            raise _too_large(path, size, most)
        unless_returned.pop_all()
    return stream


def open_regular(path: str | os.PathLike[str], *, dir_fd: int | None = None, follow: bool = False) -> int:
    """A descriptor of a regular file; opening it waits for no pipe.

    Args:
        path: The file.
        dir_fd: The folder that ``path`` is relative to, held open; None for the current one.
        follow: Whether a link in its last component is followed; if not, it is refused (ELOOP).

    Raises:
        OSError: It cannot be opened, or is no regular file (EINVAL, EISDIR).
    """
    flags = os.O_RDONLY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, flag, 0)
    descriptor = os.open(path, flags) if dir_fd is None else os.open(path, flags, dir_fd=dir_fd)
    with ExitStack() as refused:
        refused.callback(os.close, descriptor)
        _refuse_other_kinds(path, os.fstat(descriptor))
        refused.pop_all()
    return descriptor


def read_input(path: str | os.PathLike[str] | Traversable, *, most: int) -> bytes:
    """Read a regular file that must not have more than so many bytes.

    A file inside the archive that the package was imported from is its own, and read as it is.

    Raises:
        OSError: As :func:`open_input`; also where it grows beyond the limit while it is read.
    """
    if not isinstance(path, str | os.PathLike):
        return path.read_bytes()
    with open_input(path, most=most) as stream:
        content = stream.read(most + 1)  # the size that a file claims is not what every file system delivers
    if len(content) > most:
        raise _too_large(path, len(content), most)
    return content


def is_input(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file, links followed; a pipe, a device or a folder of that name is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder, links followed; nothing has a name that the system refuses."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def kind_of(mode: int) -> str:
    """What a file is by its mode, in words: "a regular file", "a folder", "a pipe", ..."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def readable_limit(count: int) -> str:
    """A number of bytes in the largest unit that divides it."""
    unit, name = next(((size, name) for size, name in _UNITS if count and count % size == 0), (1, "bytes"))
    return f"{count // unit:,} {name}"


def _refuse_other_kinds(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(code, f"it is {kind_of(status.st_mode)}, expected a regular file", os.fspath(path))


def _too_large(path: str | os.PathLike[str], size: int, most: int) -> OSError:
    words = f"it has {size:,} bytes or more, expected at most {readable_limit(most)}"
    return OSError(errno.EFBIG, words, os.fspath(path))


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
    with suppress(OSError):  # the rename has happened; not every file system can sync a folder
        sync_folder(place.parent)


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


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}:  # some network file systems
            raise
    finally:
        os.close(descriptor)
