"""Names of files inside a bundle, and how a name becomes a path that is safe to open."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MAX_NAME_LENGTH = 1024
_MAX_PART_LENGTH = 255
_FORBIDDEN = re.compile(r'[^ -~]|[\\:*?"<>|]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9]|conin\$|conout\$) *(\..*)?", re.IGNORECASE | re.DOTALL)
_REPARSE_POINT = 0x400  # Windows: junctions and links of every kind


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What ``stat`` says about a file; if any of it changes, the file must be hashed again."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def file_state(status: os.stat_result) -> FileState:
    """Pick the fields that change when a file is written or replaced."""
    return FileState(
        device=status.st_dev,
        inode=status.st_ino,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        changed_ns=status.st_ctime_ns,
    )


def name_problem(name: str) -> str | None:
    """Say why ``name`` cannot be a file of a bundle, or return None if it can.

    A name is relative, separated by ``/``, stays inside the bundle and means the same on Linux, macOS and Windows:
    printable ASCII (others differ in how they write one and the same accented letter), no device of Windows.
    """
    if not name or len(name) > _MAX_NAME_LENGTH:
        return f"must have 1 to {_MAX_NAME_LENGTH} characters, has {len(name)}"
    if name.startswith("/"):
        return "is an absolute path; only paths relative to the bundle are allowed"
    bad = _FORBIDDEN.search(name)
    if bad:
        return (
            f"contains {bad.group()!r}; use '/' between folders, no drive letter or control character, and of other "
            "characters only those of ASCII"
        )
    for part in name.split("/"):
        if part in {"", ".", ".."}:
            return f"contains the path component {part!r}, which could lead out of the bundle"
        if part.endswith((".", " ")):
            return f"contains {part!r}, which ends in a dot or a space (Windows drops those)"
        if len(part) > _MAX_PART_LENGTH:
            return f"contains a component of {len(part)} characters; file systems take {_MAX_PART_LENGTH}"
        if _DEVICE.fullmatch(part):
            return f"contains {part!r}, which is a device on Windows"
    return None


def collision_problems(names: Iterable[str]) -> list[str]:
    """Say which names, or folders of them, differ in upper and lower case only: one file on macOS and Windows."""
    spelled: dict[str, str] = {}
    problems = []
    for name in names:
        for end in [at for at, character in enumerate(name) if character == "/"] + [len(name)]:
            path = name[:end]
            first = spelled.setdefault(path.lower(), path)
            if first != path:
                problems.append(
                    f"{first!r} and {path!r} differ in upper and lower case only: other systems take them for one"
                )
                break
    return problems


def is_link(status: os.stat_result) -> bool:
    """True for a symbolic link or, on Windows, any reparse point (junctions included)."""
    return stat.S_ISLNK(status.st_mode) or bool(getattr(status, "st_file_attributes", 0) & _REPARSE_POINT)


def file_problem(folder: Path, name: str, dir_fd: int | None = None) -> str | None:
    """Walk from ``folder`` to ``name`` without following links; say what is wrong, or return None.

    ``name`` must have passed :func:`name_problem`. ``dir_fd`` is the folder where it is held open.
    """
    parts = name.split("/")
    for index in range(len(parts)):
        shown = "/".join(parts[: index + 1])
        try:
            status = (
                os.lstat(folder / shown) if dir_fd is None else os.stat(shown, dir_fd=dir_fd, follow_symlinks=False)
            )
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if is_link(status):
            return f"goes through a link ({shown!r}); a bundle holds regular files only"
        if index < len(parts) - 1 and not stat.S_ISDIR(status.st_mode):
            return f"is missing ({shown!r} is not a folder)"
        if index == len(parts) - 1 and not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
    return None


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Everything below a folder, links not followed."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    problems: tuple[str, ...]


def list_tree(folder: Path, dir_fd: int | None = None) -> Tree:
    """List a folder recursively.

    Args:
        folder: The folder.
        dir_fd: The folder where it is held open.

    Returns:
        Names relative to ``folder``, sorted; links, sockets, pipes and devices are in ``problems`` and
        nowhere else.

    Raises:
        OSError: A folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    problems: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with _entries(folder, prefix, dir_fd) as entries:
            for entry in entries:
                name = prefix + entry.name
                status = entry.stat(follow_symlinks=False)
                if is_link(status):
                    problems.append(f"{name!r} is a link; a bundle holds regular files only")
                elif stat.S_ISDIR(status.st_mode):
                    folders.append(name)
                    pending.append(f"{name}/")
                elif stat.S_ISREG(status.st_mode):
                    files.append(name)
                else:
                    problems.append(f"{name!r} is not a regular file")
    return Tree(files=tuple(sorted(files)), folders=tuple(sorted(folders)), problems=tuple(sorted(problems)))


@contextmanager
def _entries(folder: Path, prefix: str, dir_fd: int | None) -> Iterator[Iterator[os.DirEntry[str]]]:
    """What a folder below ``folder`` holds."""
    if dir_fd is None:
        with os.scandir(folder / prefix) as entries:
            yield entries
        return
    # A descriptor of its own, "." for the folder itself: one that was listed before is at its end.
    below = os.open(prefix or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        with os.scandir(below) as entries:
            yield entries
    finally:
        os.close(below)
