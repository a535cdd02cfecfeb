"""Folders that belong to a process: locks on them, whether their owner still runs, and folders for the time of a block.

::

    PREFIX-PID-RANDOM    locked (``flock``) by the process PID while it lives

What killed processes left is swept by the next one, never a live one's, by the rules of unfinished bundles
(:mod:`crt_export.bundle.recovery`): a folder is abandoned when its lock is free and no process with its PID can have
made it. Nobody else's folders are touched, nor links, whatever they are called.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from crt_export.errors import BundleError
from crt_export.termination import not_interrupted, orderly_termination

if sys.platform == "win32":
    import ctypes
else:
    import fcntl

_LOCK_SECONDS = 60.0
_CLOCK_SLACK_SECONDS = 5.0
_STILL_ACTIVE = 259
_QUERY_LIMITED_INFORMATION = 0x1000
#: Names of this process's folders from before they are made until they are gone: they are locked a moment later only.
_LIVE: set[str] = set()
#: Of folders in the system's folder for temporary files.
PREFIX = "crt-export"


def user_cache(name: str) -> Path | None:
    """``crt-export/NAME`` in $XDG_CACHE_HOME or ~/.cache; None where there is no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification: a relative path is to be ignored.
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # no home folder can be told
        return None
    return base / "crt-export" / name


def lock_folder(folder: Path) -> int:
    """Take the exclusive advisory lock of a folder without waiting.

    Returns:
        A descriptor that holds the lock until :func:`unlock_folder` or the end of the process.

    Raises:
        BlockingIOError: Somebody else holds it.
        OSError: Folders cannot be locked here (Windows, some network file systems).
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "folders cannot be locked on Windows", str(folder))
    descriptor = os.open(folder, os.O_RDONLY)
    with ExitStack() as unless_locked:
        unless_locked.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unless_locked.pop_all()
    return descriptor


def unlock_folder(descriptor: int) -> None:
    """Release a lock, also where a forked child still has a copy of the descriptor."""
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder for the few operations that must not interleave with another build's.

    Yields:
        False where folders cannot be locked; nothing is held then.

    Raises:
        BundleError: Somebody else held the lock for a minute.
    """
    descriptor: int | None = None
    deadline = time.monotonic() + _LOCK_SECONDS
    while descriptor is None:
        try:
            descriptor = lock_folder(folder)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BundleError(
                    f"another program has locked {folder} for {_LOCK_SECONDS:.0f} s: "
                    "wait for it or end it, then try again"
                ) from None
            time.sleep(0.02)
        except OSError:
            break
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            unlock_folder(descriptor)


def is_abandoned(folder: Path, pid: int) -> bool:
    """True if no running process can own a folder whose owner locks it and writes its PID into the name."""
    try:
        descriptor = lock_folder(folder)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: the PID must decide, and our own PID may be another thread's
        return not can_be_owner(folder, pid)
    unlock_folder(descriptor)
    return pid == os.getpid() or not can_be_owner(folder, pid)


def can_be_owner(folder: Path, pid: int) -> bool:
    """True if a process with this PID runs and is old enough to have made the folder."""
    if not is_running(pid):
        return False
    started = start_time(pid)
    if started is None:
        return True
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    # A bundle set aside by a rename keeps its old modification time; only its change time is recent.
    return started <= max(status.st_mtime, status.st_ctime) + _CLOCK_SLACK_SECONDS


def is_running(pid: int) -> bool:
    """True if a process of this machine (or container) has this PID."""
    if sys.platform == "win32":  # os.kill(pid, 0) would end the process there
        kernel = ctypes.windll.kernel32
        handle = kernel.OpenProcess(_QUERY_LIMITED_INFORMATION, False, pid)
        if not handle:
            return False
        code = ctypes.c_ulong()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return code.value == _STILL_ACTIVE
    if pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def start_time(pid: int) -> float | None:
    """When a process started, in seconds since 1970; infinite if it has ended, None if /proc is silent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] in {b"Z", b"X"}:  # ended, though its parent has not asked for its exit status yet
            return math.inf
        boot = next(line for line in Path("/proc/stat").read_text("ascii").splitlines() if line.startswith("btime "))
        return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None


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
        folder = parent / f"{prefix}-{os.getpid()}-{secrets.token_hex(8)}"
        lock: int | None = None
        try:
            _LIVE.add(folder.name)
            folder.mkdir(mode=0o700)
            with suppress(OSError):  # no locks on this file system: the PID in the name has to do
                lock = lock_folder(folder)
            yield folder
        finally:
            with not_interrupted():  # by whoever is told to end twice
                shutil.rmtree(folder, ignore_errors=True)
                _LIVE.discard(folder.name)
                if lock is not None:
                    unlock_folder(lock)


def sweep_abandoned(parent: Path | None = None, prefix: str = PREFIX) -> None:
    """Remove the folders of this user's dead processes; whatever cannot be removed stays."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    pattern = re.compile(rf"{re.escape(prefix)}-(?P<pid>[0-9]{{1,10}})-[a-z0-9_]+")
    with suppress(OSError):
        for folder in [*parent.iterdir()]:
            match = pattern.fullmatch(folder.name)
            if match is None or folder.name in _LIVE or not _is_own_folder(folder):
                continue
            if is_abandoned(folder, int(match["pid"])):
                shutil.rmtree(folder, ignore_errors=True)


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (os.name != "posix" or status.st_uid == os.getuid())
