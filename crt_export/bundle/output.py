"""Decide whether a bundle may be written to a place, before any work and without changing anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from crt_export.bundle.leftovers import parse_leftover
from crt_export.bundle.manifest import read_manifest
from crt_export.bundle.ownership import folder_lock
from crt_export.bundle.paths import list_tree
from crt_export.bundle.schema import MANIFEST_NAME
from crt_export.errors import BundleError, problem_list
from crt_export.input_file import kind_of

_SHOWN_NAMES = 5


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
    if parse_leftover(target) is not None:
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
