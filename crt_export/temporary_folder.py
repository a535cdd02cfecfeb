"""Folders for the time of a block, and what killed processes left of them: swept by the next one, never a live one's.

::

    PREFIX-PID-RANDOM    locked (``flock``) by the process PID while it lives

The rules are those of unfinished bundles (:mod:`crt_export.bundle.recovery`): a folder is abandoned when its lock is
free and no process with its PID can have made it. Nobody else's folders are touched, nor links, whatever they are
called.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crt_export.bundle.ownership import is_abandoned, lock_folder, unlock_folder
from crt_export.termination import not_interrupted, orderly_termination

#: Of folders in the system's folder for temporary files.
PREFIX = "crt-export"


@contextmanager
def temporary_folder(parent: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """Make a folder that only this user can read; leaving the block, by SIGTERM too, removes it.

    Args:
        parent: Where; None for the system's folder for temporary files.
        prefix: Of its name; what dead processes left under the same one is removed first.

    Raises:
        OSError: It cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep_abandoned(parent, prefix)
    with orderly_termination():
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-{os.getpid()}-", dir=parent))
        lock: int | None = None
        try:
            with suppress(OSError):  # no locks on this file system: the PID in the name has to do
                lock = lock_folder(folder)
            yield folder
        finally:
            with not_interrupted():  # by whoever is told to end twice
                shutil.rmtree(folder, ignore_errors=True)
                if lock is not None:
                    unlock_folder(lock)


def sweep_abandoned(parent: Path | None = None, prefix: str = PREFIX) -> None:
    """Remove the folders of this user's dead processes; whatever cannot be removed stays."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    pattern = re.compile(rf"{re.escape(prefix)}-(?P<pid>[0-9]{{1,10}})-[a-z0-9_]+")
    with suppress(OSError):
        entries = [entry for entry in parent.iterdir() if pattern.fullmatch(entry.name)]
        for folder in entries:
            match = pattern.fullmatch(folder.name)
            if match is not None and _is_own_folder(folder) and is_abandoned(folder, int(match["pid"])):
                shutil.rmtree(folder, ignore_errors=True)


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (os.name != "posix" or status.st_uid == os.getuid())
