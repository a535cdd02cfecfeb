"""Exchange of folders: a finished one put in the place of another.

Linux swaps two folders in one step (renameat2 with RENAME_EXCHANGE, Linux 3.15, ext4, xfs, btrfs, tmpfs,
overlayfs). Elsewhere it takes two renames; between them the old folder is called ``.NAME.previous-PID``,
which :func:`crt_export.bundle.recovery.restore_previous` knows how to undo.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

from crt_export.user_files import sync_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}


def exchange_folders(first: Path, second: Path) -> bool:
    """Swap two existing folders in one atomic step.

    Returns:
        False if this system or file system cannot do that; nothing has changed then.

    Raises:
        OSError: It could, but this call failed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # a C library without it, such as older musl
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def replace_folder(new: Path, output: Path, previous: Path) -> Path | None:
    """Give ``new`` the name ``output``.

    Args:
        new: The complete folder; its content is already on the disk.
        output: Absent, an empty folder, or the folder to replace.
        previous: Name to park the old folder under where the system cannot swap two folders; must not exist.

    Returns:
        Where the old folder is now, or None if there was none.

    Raises:
        OSError: The folders could not be renamed, and ``output`` is what it was; or the parent folder could
            not be synced.
    """
    if not output.exists() or not any(output.iterdir()):
        if os.name != "posix" and output.exists():
            output.rmdir()  # only POSIX renames over an empty folder
        new.rename(output)
        sync_folder(output.parent)
        return None
    if exchange_folders(new, output):
        sync_folder(output.parent)
        return new
    try:
        output.rename(previous)
        sync_folder(output.parent)
        new.rename(output)
    finally:
        # Between the two renames there is no output: whatever ended the second one, the old output goes back.
        if previous.exists() and not output.exists():
            previous.rename(output)
    sync_folder(output.parent)
    return previous
