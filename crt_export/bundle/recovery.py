"""Recovery from what killed builds leave beside a bundle.

A live build holds an advisory lock (``flock``) on its partial folder, which the system drops when the process
dies, whatever killed it. A partial is abandoned when its lock is free *and* no process with its PID can have
made it. The lock alone would do, but not every file system has locks; the PID alone would not, because PIDs
are used again (in a container every build may be PID 1) and because another container's PIDs are invisible.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crt_export.bundle.schema import MANIFEST_NAME
from crt_export.errors import BundleError
from crt_export.folders import can_be_owner, folder_lock, is_abandoned
from crt_export.user_files import sync_folder

_PATTERN = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|previous)-(?P<pid>[0-9]{1,10})", re.DOTALL)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all below it, links not followed; its manifest goes first.

    Without a manifest a half-removed folder can never be taken for a bundle.

    Raises:
        OSError: Something could not be removed.
    """
    try:
        with contextlib.suppress(IsADirectoryError):
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except FileNotFoundError:
        if folder.exists():
            raise
    except PermissionError:
        folder.chmod(0o700)
        for parent, names, _ in os.walk(folder):  # read-only folders inside: open them, then try once more
            for path in (Path(parent, name) for name in names):
                if not path.is_symlink():
                    path.chmod(0o700)
        shutil.rmtree(folder)


@dataclass(frozen=True, kw_only=True)
class BuildFolder:
    """A folder named ``.NAME.partial-PID`` (a build) or ``.NAME.previous-PID`` (the old output)."""

    path: Path
    name: str
    kind: str
    pid: int


def build_folder_path(output: Path, kind: Literal["partial", "previous"]) -> Path:
    """This process's name for its unfinished build of ``output``, or for the old output set aside."""
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}")


def parse_build_folder(path: Path) -> BuildFolder | None:
    """Read the name of such a folder; None if ``path`` is not named like one."""
    match = _PATTERN.fullmatch(path.name)
    if match is None:
        return None
    return BuildFolder(path=path, name=match["name"], kind=match["kind"], pid=int(match["pid"]))


def build_folders(output: Path) -> list[BuildFolder]:
    """All such folders beside ``output``, sorted by name; links and files named alike are left alone."""
    found: list[BuildFolder] = []
    try:
        entries = sorted(entry.name for entry in output.parent.iterdir())
    except OSError:  # an absent or unreadable parent is reported by whoever needs it
        return found
    for entry in entries:
        folder = parse_build_folder(output.parent / entry)
        if folder is not None and folder.name == output.name and _is_plain_folder(folder.path):
            found.append(folder)
    return found


def restore_previous(output: Path) -> bool:
    """Undo a replacement that was cut off between its two renames.

    Returns:
        True if the old bundle is back under its own name; False if there was nothing to do.

    Raises:
        BundleError: The old bundle is there but cannot be moved back.
    """
    if not _is_absent(output) or not _set_aside(output):
        return False
    with folder_lock(output.parent) as locked:
        # Look once more: whoever held the lock may have finished; without locks a running owner still may.
        candidates = [
            one for one in _set_aside(output) if locked or one.pid == os.getpid() or not can_be_owner(one.path, one.pid)
        ]
        if not candidates or not _is_absent(output):
            return False
        newest = max(candidates, key=lambda folder: os.lstat(folder.path).st_mtime_ns).path
        try:
            if os.name != "posix" and output.exists():
                output.rmdir()
            newest.rename(output)
            sync_folder(output.parent)
        except OSError as error:
            raise BundleError(
                f"the last build of {output} was interrupted and the old bundle cannot be put back "
                f"({error.strerror}): rename {newest} to {output.name} by hand"
            ) from error
    return True


def sweep_abandoned_builds(output: Path) -> None:
    """Remove what dead builds of ``output`` left.

    Call it after :func:`restore_previous` and with the parent folder locked.
    A folder that cannot be removed causes a RuntimeWarning, not an error: it is in nobody's way.
    """
    for folder in build_folders(output):
        superseded = folder.kind == "partial" or (output / MANIFEST_NAME).is_file()
        if superseded and is_abandoned(folder.path, folder.pid):
            remove_or_warn(folder.path)


def remove_or_warn(folder: Path) -> None:
    """Remove a folder that nobody needs; a failure is worth a RuntimeWarning, not an error."""
    try:
        remove_folder(folder)
    except OSError as error:
        warnings.warn(f"could not remove {folder}: {error.strerror}; remove it by hand", RuntimeWarning, stacklevel=2)


def _is_plain_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_absent(output: Path) -> bool:
    """True if ``output`` does not exist or is an empty folder."""
    try:
        return not any(output.iterdir())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _set_aside(output: Path) -> list[BuildFolder]:
    return [
        folder
        for folder in build_folders(output)
        if folder.kind == "previous" and (folder.path / MANIFEST_NAME).is_file()
    ]
