"""A bundle being written beside its output: put there in one step, or the output stays exactly as it was.

Whether a bundle may be written to a place at all is decided first, before any work and without changing anything.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crt_export.bundle.exchange import replace_folder
from crt_export.bundle.files import BundleFiles
from crt_export.bundle.held import hash_file
from crt_export.bundle.manifest import manifest_text, read_manifest
from crt_export.bundle.paths import FileState, collision_problems, file_state, list_tree, name_problem
from crt_export.bundle.read import open_staged
from crt_export.bundle.recovery import (
    build_folder_path,
    parse_build_folder,
    remove_or_warn,
    restore_previous,
    sweep_abandoned_builds,
)
from crt_export.bundle.schema import MANIFEST_NAME, SCHEMA_VERSION
from crt_export.errors import BundleError, problem_list
from crt_export.folders import folder_lock, lock_folder, unlock_folder
from crt_export.termination import not_interrupted, orderly_termination
from crt_export.user_files import kind_of, sync_folder

_SHOWN_NAMES = 5
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(output: str | os.PathLike[str]) -> Path:
    """Check that a bundle may be written to ``output``; changes nothing.

    Returns:
        The absolute path that will be written, links resolved.

    Raises:
        BundleError: It is a file, not writable, a mount point, the current folder or a folder around it, or a
            folder that holds anything but files of a bundle.
    """
    target = target_folder(output)
    with folder_lock(target.parent):  # or another build might be halfway through replacing it
        check_target(target)
    return target


def target_folder(output: str | os.PathLike[str]) -> Path:
    """Make an output absolute, links resolved; refuse names that can never be an output."""
    if not os.fspath(output) or "\0" in os.fspath(output):
        raise BundleError(f"the output must be the name of a folder, found {os.fspath(output)!r}")
    try:
        target = Path(os.path.realpath(output))
    except FileNotFoundError:
        raise BundleError(f"the output {output} is relative to a current folder that no longer exists") from None
    if parse_build_folder(target) is not None:
        raise BundleError(
            f"{target.name!r} is a name that crt-export gives to unfinished builds: choose another output"
        )
    if _is_around_current_folder(target):
        raise BundleError(
            f"the output {target} is the current folder or one around it, and replacing that would pull it "
            "away from under you: choose a folder inside it, or change to another folder first"
        )
    return target


def _is_around_current_folder(target: Path) -> bool:
    try:
        current = Path(os.path.realpath(os.curdir))
    except FileNotFoundError:
        return False
    return target == current or target in current.parents


def check_target(target: Path) -> None:
    """:func:`check_output` for a path from :func:`target_folder`, with the parent folder locked by the caller."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        _check_parent(target)
        return
    except OSError as error:
        raise BundleError(f"cannot use the output {target}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        found = "a file" if stat.S_ISREG(mode) else kind_of(mode)
        raise BundleError(f"the output {target} is {found}; expected a folder, or a name that is still free")
    if os.path.ismount(target):
        raise BundleError(f"the output {target} is a mount point and cannot be replaced: choose a folder inside it")
    if not os.access(target, os.R_OK | os.W_OK | os.X_OK):
        raise BundleError(f"the output {target} is not writable: change its permissions or choose another output")
    _check_parent(target)
    _check_replaceable(target)


def _check_parent(target: Path) -> None:
    parent = target.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise BundleError(f"cannot write to {target}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write to {target}: the folder {parent} is not writable")


def _check_replaceable(target: Path) -> None:
    """Refuse a folder that holds anything this tool did not write and list."""
    if not any(target.iterdir()):
        return
    keep = "it is left as it is: choose another output, or move it away yourself"
    try:
        manifest = read_manifest(target)
        tree = list_tree(target)
    except BundleError as error:
        shown = sorted(entry.name for entry in target.iterdir())
        names = ", ".join(shown[:_SHOWN_NAMES]) + (", ..." if len(shown) > _SHOWN_NAMES else "")
        # The reader's own message ends with how to build a bundle, which is what the caller is doing.
        absent = not os.path.lexists(target / MANIFEST_NAME)
        reason = f"it is not a bundle, it has no {MANIFEST_NAME}" if absent else str(error)
        raise BundleError(f"the output {target} (holding {names}) cannot be replaced, {keep}: {reason}") from error
    except OSError as error:
        raise BundleError(f"cannot read the output {error.filename}: {error.strerror}") from error
    listed = {MANIFEST_NAME, *manifest["files"]}
    foreign = [f"{name!r} was not written by the build" for name in tree.files if name not in listed]
    problems = foreign + list(tree.problems)
    if problems:
        raise BundleError(
            problem_list(f"replacing the bundle {target} would delete files that are not its own", problems)
        )


class Staging:
    """A bundle being written. Made by :func:`stage_bundle`.

    Attributes:
        path: Folder to write the bundle's files into.
        output: Where :meth:`commit` will put it.
        committed: Whether the bundle is there.
        digests: SHA-256 (hex) of files by name, from whoever hashed them while they were written: they are hashed again
            when the bundle is opened, and not before.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.output = output
        self.digests: dict[str, str] = {}
        self.committed = False
        self._completed = False
        self._sealed: dict[str, tuple[FileState, str]] = {}

    def complete(self, manifest: Mapping[str, Any]) -> BundleFiles:
        """Write the manifest and open the folder as applications open a bundle: what is checked is what ships.

        Args:
            manifest: As for :meth:`commit`, which completes it again with the verdict.

        Returns:
            The files; close them before the commit.

        Raises:
            BundleError: As for :meth:`commit`.
        """
        try:
            self._write(manifest)
        except OSError as error:
            raise _error_of_write(error, self.output) from error
        return open_staged(self.path)

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Complete the bundle and put it at ``output``; only then is an old bundle there removed.

        Args:
            manifest: Everything but ``schema_version``, ``integrity`` and ``files``, which are set here from
                what is on the disk.

        Raises:
            BundleError: The bundle is committed already, holds a link or an unportable file name, the
                manifest breaks its schema, or the output cannot be replaced. The output is unchanged then.
        """
        if self.committed:
            raise BundleError(f"the bundle {self.output} is committed already; call stage_bundle again for another one")
        try:
            self._write(manifest)
            with folder_lock(self.output.parent):
                check_target(self.output)  # minutes have passed since the first check
                old = replace_folder(self.path, self.output, build_folder_path(self.output, "previous"))
                self.committed = True
                if old is not None:
                    remove_or_warn(old)
        except OSError as error:
            raise _error_of_write(error, self.output) from error

    def _write(self, manifest: Mapping[str, Any]) -> None:
        """Force every file and folder to the disk, the manifest last."""
        if self._completed:
            (self.path / MANIFEST_NAME).unlink()
            self._completed = False
        files = self._sealed_files()
        text = manifest_text({**manifest, "schema_version": SCHEMA_VERSION, "files": files})
        _write_synced(self.path / MANIFEST_NAME, text)
        self._completed = True
        sync_folder(self.path)

    def _sealed_files(self) -> dict[str, dict[str, Any]]:
        """Force every file and folder to the disk; return the manifest's ``files``."""
        tree = list_tree(self.path)
        problems = list(tree.problems)
        for name in (*tree.files, *tree.folders):
            problem = name_problem(name)
            if problem:
                problems.append(f"{name!r}: the path {problem}")
        problems += collision_problems(tree.files)
        if MANIFEST_NAME in tree.files or MANIFEST_NAME in tree.folders:
            problems.append(f"{MANIFEST_NAME!r} is written by commit and by nobody else")
        if problems:
            raise BundleError(problem_list(f"these files cannot go into a bundle ({self.path})", problems))
        files: dict[str, dict[str, Any]] = {}
        for name in tree.files:
            state, digest = self._seal(name)
            files[name] = {"size": state.size, "sha256": digest}
        for name in reversed(tree.folders):
            sync_folder(self.path / name)
        return files

    def _seal(self, name: str) -> tuple[FileState, str]:
        """State and digest of a file that is on the disk; hashed where nobody has done so, or it changed since."""
        path = self.path / name
        sealed = self._sealed.get(name)
        if sealed is None or sealed[0] != file_state(path.lstat()):
            known = self.digests.get(name) if sealed is None else None
            digest, state = hash_file(path, sync=True, known=known)
            sealed = self._sealed[name] = (state, digest)
        return sealed


@contextmanager
def stage_bundle(output: str | os.PathLike[str]) -> Iterator[Staging]:
    """Prepare a new bundle for ``output``; use as a context manager.

    Missing parent folders are made. The files are written to ``.NAME.partial-PID`` beside the output; leaving
    the block without :meth:`Staging.commit`, by an error or by Ctrl-C removes it; so does SIGTERM or SIGHUP in the main
    thread, unless the application handles that itself. What earlier builds left when they were killed is put right
    first. Builds of the same output by several processes do not disturb
    each other; the last commit wins.

    Args:
        output: Absent, an empty folder, or a bundle, which the new one replaces.

    Yields:
        The staging folder.

    Raises:
        BundleError: The output is something else, cannot be written, or the disk is full; nothing was changed
            then.
    """
    with orderly_termination():
        yield from _staged(check_output(output))


def _staged(target: Path) -> Iterator[Staging]:
    made = _make_parents(target.parent)
    partial = build_folder_path(target, "partial")
    lock: int | None = None
    owned = False
    try:
        restore_previous(target)
        with folder_lock(target.parent):
            check_target(target)
            sweep_abandoned_builds(target)
            _make_partial(partial, target)
            owned = True
            with suppress(OSError):  # no locks on this file system: the PID in the name has to do
                lock = lock_folder(partial)
        yield Staging(partial, target)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _error_of_write(error, target) from error
        raise
    finally:
        with not_interrupted():
            _clean_up(partial if owned else None, target, made)
            if lock is not None:
                unlock_folder(lock)


def _make_parents(parent: Path) -> list[Path]:
    """Make missing folders; return those that were made, deepest first."""
    missing: list[Path] = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    made: list[Path] = []
    for folder in reversed(missing):
        try:
            folder.mkdir()
        except FileExistsError:  # another build made it meanwhile
            continue
        except OSError as error:
            _remove_empty(made)
            raise BundleError(f"cannot make the folder {folder}: {error.strerror}") from error
        made.insert(0, folder)
    return made


def _make_partial(partial: Path, target: Path) -> None:
    try:
        partial.mkdir()
    except FileExistsError:
        raise BundleError(
            f"{partial} exists: another build of {target.name} is running in this process; "
            "if none is, remove that folder"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot write beside the output {target}: {error.strerror}") from error


def _clean_up(partial: Path | None, target: Path, made: list[Path]) -> None:
    """Remove what this build leaves: before the swap the partial is the new bundle, after it the old one."""
    if partial is not None:
        if os.path.lexists(partial):
            remove_or_warn(partial)
        previous = build_folder_path(target, "previous")
        if previous.exists() and (target / MANIFEST_NAME).is_file():
            remove_or_warn(previous)
    _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        with suppress(OSError):  # no longer empty: in use
            folder.rmdir()


def _write_synced(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _error_of_write(error: OSError, target: Path) -> BundleError:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _DISK_FULL:
        return BundleError(
            f"no room to write the bundle{where}: {error.strerror}; free space and build again; {target} is as it was"
        )
    return BundleError(f"cannot complete the bundle {target}{where}: {error.strerror}; what was there before is kept")
