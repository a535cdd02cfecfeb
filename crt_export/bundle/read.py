"""Opening of a bundle: manifest and files of one and the same folder, whatever a build does to it meanwhile."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from crt_export.bundle.files import BundleFiles
from crt_export.bundle.held import HeldFolder
from crt_export.bundle.manifest import files_are_as_written, read_manifest_and_identity
from crt_export.bundle.recovery import build_folders, parse_build_folder, restore_previous
from crt_export.bundle.schema import MANIFEST_NAME
from crt_export.errors import BundleError
from crt_export.folders import folder_lock


def open_bundle(
    path: str | os.PathLike[str], allow_unvalidated: bool = False, identity: str | None = None
) -> BundleFiles:
    """Open a bundle for reading.

    Only the manifest is read; files are checked when they are asked for. If a crash interrupted the
    replacement of this bundle, the old one is put back first.

    Args:
        path: The bundle folder.
        allow_unvalidated: Also open a bundle whose parity with PyTorch was never shown.
        identity: SHA-256 (hex) that its manifest must have; None takes any bundle.

    Returns:
        Access to the files.

    Raises:
        BundleError: There is no bundle, it is unfinished, damaged, too new, unvalidated, or another one than
            ``identity`` says.
    """
    if identity is not None and not isinstance(identity, str):
        raise BundleError(
            f"expected an identity, 64 hex digits as 'inspect' prints them, found {type(identity).__name__}"
        )
    folder = _real_folder(path)
    unfinished = parse_build_folder(folder)
    if unfinished is not None:
        raise BundleError(
            f"{folder} is what an interrupted or running build left behind, not a bundle: "
            f"open {folder.parent / unfinished.name}, or build it again (that removes it)"
        )
    bundle = _held_bundle(folder)
    if identity is not None and bundle.identity != identity:
        raise BundleError(
            f"{folder} is another bundle: expected the identity {identity!r:.80} (SHA-256 of {MANIFEST_NAME}), found "
            f"{bundle.identity}; get the bundle that was meant, or expect this one if you trust it"
        )
    if not bundle.manifest["validated"] and not allow_unvalidated:
        raise BundleError(
            f"{folder} is not validated: its agreement with PyTorch was never shown; build it without "
            "--unvalidated, or pass allow_unvalidated=True if that is what you want"
        )
    return bundle


def open_staged(folder: Path) -> BundleFiles:
    """Open the bundle that a build has completed in its staging folder, and will put in its place if it agrees.

    Raises:
        BundleError: Its manifest cannot be read.
    """
    return _proven(_read_bundle(folder)[0])


def _real_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, links resolved; refuses what no path can be: NUL characters, too many of them, other types."""
    try:
        text = os.fsdecode(path)
        too_long = _is_too_long(text)
    except (TypeError, ValueError) as error:
        raise BundleError(f"expected the path of a bundle folder, found {path!r} ({error})") from error
    if too_long:
        shown = f"{text[:60]!r}... of {len(text):,} characters"
        raise BundleError(f"expected the path of a bundle folder, found {shown} ({os.strerror(errno.ENAMETOOLONG)})")
    return Path(os.path.realpath(text))


def _is_too_long(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:  # what else is wrong with a path is said later
        return error.errno == errno.ENAMETOOLONG
    return False


def _held_bundle(folder: Path) -> BundleFiles:
    """Manifest and files of one and the same folder; once more if it was exchanged or removed meanwhile."""
    restore_previous(folder)
    with suppress(BundleError):
        bundle, complete = _read_bundle(folder)
        if complete or not bundle.exchanged:
            return _proven(bundle)
    with folder_lock(folder.parent):  # a build may have been between its two renames just then
        _check_folder(folder)
        return _proven(_read_bundle(folder)[0])


def _read_bundle(path: Path) -> tuple[BundleFiles, bool]:
    try:
        folder = HeldFolder(path)
    except OSError as error:
        raise BundleError(f"cannot open the bundle folder {path}: {error.strerror}") from error
    bundle = BundleFiles(folder, *read_manifest_and_identity(folder))
    return bundle, bundle.hold()


def _proven(bundle: BundleFiles) -> BundleFiles:
    """A table of files that was written anew after the manifest is believed when every file proves it."""
    if not files_are_as_written(bundle.manifest):
        bundle.verify_all()
    return bundle


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise BundleError(f"expected a bundle folder, found a file: {folder}")
    unfinished = [one.path.name for one in build_folders(folder) if one.kind == "partial"]
    hint = (
        f"; an unfinished build is beside it ({', '.join(unfinished)}): let it finish or build again"
        if unfinished
        else ""
    )
    raise BundleError(f"no such bundle folder: {folder}{hint}")
