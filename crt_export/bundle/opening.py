"""Read a bundle: nothing in it is opened by anybody before its name, kind, size and SHA-256 were checked."""

from __future__ import annotations

import difflib
import os
import posixpath
from contextlib import suppress
from pathlib import Path
from typing import Any

from crt_export.bundle.external_data import external_tensors
from crt_export.bundle.leftovers import find_leftovers, parse_leftover, restore_previous
from crt_export.bundle.manifest import read_manifest_and_identity
from crt_export.bundle.ownership import folder_lock
from crt_export.bundle.paths import FileState, file_problem, file_state, hash_file, list_tree, name_problem
from crt_export.bundle.schema import MANIFEST_NAME
from crt_export.errors import BundleError, problem_list

_AGAIN = "the bundle was changed after it was built; build it again or restore it from its source"


class BundleFiles:
    """The files of an opened bundle. Made by :func:`open_bundle`.

    A file is hashed when it is first asked for, and again only if ``stat`` shows that it changed since.
    What happens to a file between this check and the moment a runtime opens it is outside this class: keep
    bundles in folders that only trusted users can write to.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], identity: str) -> None:
        self._path = path
        self._manifest = manifest
        self._identity = identity
        self._verified: dict[str, FileState] = {}
        self._scanned: dict[str, FileState] = {}

    @property
    def path(self) -> Path:
        """The bundle folder, absolute, links resolved."""
        return self._path

    @property
    def manifest(self) -> dict[str, Any]:
        """The checked manifest; treat it as read-only."""
        return self._manifest

    @property
    def identity(self) -> str:
        """SHA-256 of ``manifest.json``, hex: the same for copies of a bundle, another for every other bundle."""
        return self._identity

    @property
    def names(self) -> tuple[str, ...]:
        """Every file that the manifest lists, relative to the bundle, sorted."""
        return tuple(sorted(self._manifest["files"]))

    def __contains__(self, name: object) -> bool:
        return name in self._manifest["files"]

    def file(self, name: str) -> Path:
        """Return the path of a listed file after checking it.

        Args:
            name: Path relative to the bundle, ``/`` between folders.

        Returns:
            The absolute path of a regular file, reached through no link, whose size and SHA-256 are those of
            the manifest.

        Raises:
            BundleError: The file is not listed, missing, a link, or differs from what was built.
        """
        problem = self._problem(name)
        if problem:
            raise BundleError(f"{name!r} in {self._path} {problem}; {_AGAIN}")
        return self._path / name

    def graph(self, name: str) -> Path:
        """Return the path of an ONNX graph after checking it and every weight file it points at.

        Args:
            name: A file of ``manifest["graphs"]`` or of a target's ``graphs``.

        Returns:
            The absolute path of the graph.

        Raises:
            BundleError: The name is not a graph of this bundle, a file fails its check, or the graph points
                at a file that is outside the bundle, a link, or not listed.
        """
        entries = [entry for entry in self._manifest["graphs"] if entry["file"] == name]
        of_targets = (target["graphs"].values() for target in self._manifest["targets"].values())
        if not entries and not any(name in graphs for graphs in of_targets):
            known = sorted({entry["file"] for entry in self._manifest["graphs"]})
            raise BundleError(f"{name!r} is not a graph of {self._path}; its graphs are {', '.join(known) or '(none)'}")
        path = self.file(name)
        for entry in entries:
            if entry["weights"] is not None:
                self.file(entry["weights"])
        if self._scanned.get(name) != self._verified[name]:
            problems = self._external_problems(name)
            if problems:
                raise BundleError(problem_list(f"the external data of {name!r} in {self._path}", problems))
            self._scanned[name] = self._verified[name]
        return path

    def verify_all(self) -> None:
        """Hash every file and scan every graph.

        Raises:
            BundleError: Lists every missing, changed or linked file, every file that the manifest does not
                list, and every external-data path that does not belong.
        """
        problems: list[str] = []
        for name in self.names:
            problem = self._problem(name)
            if problem:
                problems.append(f"{name!r} {problem}")
            elif name.endswith(".onnx"):
                problems += [f"the external data of {name!r}: {found}" for found in self._external_problems(name)]
        try:
            tree = list_tree(self._path)
        except OSError as error:
            problems.append(f"cannot list {error.filename}: {error.strerror}")
        else:
            listed = {MANIFEST_NAME, *self.names}
            problems += [f"{name!r} is not listed in {MANIFEST_NAME}" for name in tree.files if name not in listed]
            problems += tree.problems
        if problems:
            raise BundleError(problem_list(f"{self._path} is not as it was built", problems) + f"\n{_AGAIN}")

    def _problem(self, name: str) -> str | None:
        """Check one file; remember it if it is sound."""
        entry = self._manifest["files"].get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self.names, n=1)
            return "is not listed in the manifest" + (f" (did you mean {close[0]!r}?)" if close else "")
        problem = name_problem(name) or file_problem(self._path, name)
        if problem:
            return problem
        path = self._path / name
        try:
            state = file_state(os.lstat(path))
            if self._verified.get(name) == state:
                return None
            if state.size != entry["size"]:
                return f"has {state.size} bytes, the manifest says {entry['size']}"
            digest, state = hash_file(path)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if digest != entry["sha256"]:
            return f"has SHA-256 {digest}, the manifest says {entry['sha256']}"
        self._verified[name] = state
        return None

    def _external_problems(self, name: str) -> list[str]:
        """Check every file that the (already verified) graph ``name`` points at."""
        problems: list[str] = []
        try:
            tensors = external_tensors(self._path / name)
        except BundleError as error:
            return [str(error)]
        for location in dict.fromkeys(tensor.location for tensor in tensors):
            reason = name_problem(location)
            # ONNX: a location is relative to the folder of the graph file
            problem = f"{reason}" if reason else self._problem(posixpath.join(posixpath.dirname(name), location))
            if problem:
                tensor = next(found.tensor for found in tensors if found.location == location)
                problems.append(f"tensor {tensor!r} points at {location!r:.200}, which {problem}")
        return problems


def open_bundle(path: str | os.PathLike[str], allow_unvalidated: bool = False) -> BundleFiles:
    """Open a bundle for reading.

    Only the manifest is read; files are checked when they are asked for. If a crash interrupted the
    replacement of this bundle, the old one is put back first.

    Args:
        path: The bundle folder.
        allow_unvalidated: Also open a bundle whose parity with PyTorch was never shown.

    Returns:
        Access to the files.

    Raises:
        BundleError: There is no bundle, it is unfinished, damaged, too new, or unvalidated.
    """
    folder = _real_folder(path)
    leftover = parse_leftover(folder)
    if leftover is not None:
        raise BundleError(
            f"{folder} is what an interrupted or running build left behind, not a bundle: "
            f"open {folder.parent / leftover.name}, or build it again (that removes leftovers)"
        )
    bundle = BundleFiles(folder, *_manifest_of(folder))
    if not bundle.manifest["validated"] and not allow_unvalidated:
        raise BundleError(
            f"{folder} is not validated: its agreement with PyTorch was never shown; build it without "
            "--unvalidated, or pass allow_unvalidated=True if that is what you want"
        )
    return bundle


def _real_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, links resolved; refuses what no path can be: NUL characters, lone surrogates, other types."""
    try:
        text = os.fsdecode(path)
        with suppress(OSError):  # what is wrong with a path that can exist is said later
            os.lstat(text)
    except (TypeError, ValueError) as error:
        raise BundleError(f"expected the path of a bundle folder, found {path!r} ({error})") from error
    return Path(os.path.realpath(text))


def _manifest_of(folder: Path) -> tuple[dict[str, Any], str]:
    restore_previous(folder)
    with suppress(BundleError):
        return read_manifest_and_identity(folder)
    with folder_lock(folder.parent):  # a build may have been between its two renames just then
        _check_folder(folder)
        return read_manifest_and_identity(folder)


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise BundleError(f"expected a bundle folder, found a file: {folder}")
    unfinished = [leftover.path.name for leftover in find_leftovers(folder) if leftover.kind == "partial"]
    hint = (
        f"; an unfinished build is beside it ({', '.join(unfinished)}): let it finish or build again"
        if unfinished
        else ""
    )
    raise BundleError(f"no such bundle folder: {folder}{hint}")
