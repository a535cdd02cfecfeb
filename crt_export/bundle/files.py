"""The files of an opened bundle: none is used before its name, kind, size and SHA-256 were checked."""

from __future__ import annotations

import difflib
import errno
import posixpath
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from crt_export.bundle.external_data import ExternalTensor, external_tensors_of
from crt_export.bundle.held import HOLDS_FOLDERS, HeldFile, HeldFolder, HeldGraph, HeldWeights
from crt_export.bundle.paths import FileState, name_problem
from crt_export.bundle.schema import MANIFEST_NAME
from crt_export.errors import BundleError, problem_list

_AGAIN = "the bundle was changed after it was built; build it again or restore it from its source"
_Check = Callable[[str], str | None]
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}


class BundleFiles:
    """The files of an opened bundle. Made by :func:`open_bundle`.

    The folder and every listed file are held open from the beginning, so a bundle stays what it was when it was
    opened, though a build may have put another one in its place: :meth:`content` and :meth:`held_graph` give the very
    bytes that were hashed. A file is hashed when it is first asked for, and again only if ``stat`` shows that it
    changed since. :meth:`file` and :meth:`graph` are for those who can only open a path: what happens to the file
    between this check and their opening is theirs to rule out, with :meth:`check_unchanged` after it.
    """

    def __init__(self, folder: HeldFolder, manifest: dict[str, Any], identity: str) -> None:
        self._folder = folder
        self._manifest = manifest
        self._identity = identity
        self._held: dict[str, HeldFile] = {}
        self._verified: dict[str, FileState] = {}
        self._scanned: dict[str, tuple[FileState, tuple[ExternalTensor, ...]]] = {}
        self._used: set[str] = set()
        self._closed = False

    @property
    def path(self) -> Path:
        """The bundle folder, absolute, links resolved."""
        return self._folder.path

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

    @property
    def used(self) -> frozenset[str]:
        """Names of the files that were given out so far, weights of graphs included; a mere check is no use."""
        return frozenset(self._used)

    def __contains__(self, name: object) -> bool:
        return name in self._manifest["files"]

    def content(self, name: str) -> bytes:
        """Read a listed file.

        Args:
            name: Path relative to the bundle, ``/`` between folders.

        Returns:
            The very bytes whose size and SHA-256 are those of the manifest.

        Raises:
            BundleError: The file is not listed, missing, a link, or differs from what was built.
        """
        self._refuse(name, self._problem(name))
        try:
            with self._held[name].reader() as stream:
                content = stream.read(self._manifest["files"][name]["size"] + 1)
            changed = self._held[name].state() != self._verified[name]
        except OSError as error:
            raise BundleError(f"{name!r} in {self.path} cannot be read ({error.strerror})") from error
        self._refuse(name, "changed while it was read" if changed else None)
        self._used.add(name)
        return content

    def check(self, name: str) -> None:
        """Check what a listed file is now, and the weight files of a graph; nothing is given out.

        Raises:
            BundleError: As :meth:`file` and :meth:`graph`.
        """
        self._checked(name)
        if name.endswith(".onnx"):
            self._checked_weights(name)

    def file(self, name: str) -> Path:
        """Return the path of a listed file after checking what is there now.

        Args:
            name: Path relative to the bundle, ``/`` between folders.

        Returns:
            The absolute path of a regular file, reached through no link, whose size and SHA-256 are those of
            the manifest.

        Raises:
            BundleError: The file is not listed, missing, a link, or differs from what was built; or the bundle was
                replaced since it was opened.
        """
        path = self._checked(name)
        self._used.add(name)
        return path

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
        self._refuse_other_than_graph(name)
        path = self.file(name)
        self._used |= self._checked_weights(name)
        return path

    def held_graph(self, name: str) -> HeldGraph:
        """A graph and the weight files it points at, as they were hashed.

        Raises:
            BundleError: As :meth:`graph`.
        """
        self._refuse_other_than_graph(name)
        model = self.content(name)
        for weights in self._weights_of_entry(name):
            self._refuse(weights, self._problem(weights))
        folder = posixpath.dirname(name)
        held = {}
        for location in self._refuse_external(name, self._problem):
            other = posixpath.join(folder, location)
            self._used.add(other)
            held[location] = HeldWeights(
                path=self.path / other,
                file=self._held[other],
                state=self._verified[other],
                sha256=self._manifest["files"][other]["sha256"],
            )
        return HeldGraph(path=self.path / name, model=model, folder=self._folder.way_in / folder, weights=held)

    def check_unchanged(self) -> None:
        """Check again every file that was asked for, where its name leads now; those that did not change cost nothing.

        Raises:
            BundleError: A file is another one or differs from what was built, or the bundle was replaced.
        """
        self._refuse_other_place()
        for name in sorted(self._verified):
            self._refuse(name, self._problem_of_name(name))

    def verify_all(self) -> None:
        """Hash every file and scan every graph.

        Raises:
            BundleError: Lists every missing, changed or linked file, every file that the manifest does not
                list, and every external-data path that does not belong.
        """
        self._refuse_other_place()
        problems = self._all_problems()
        if problems:
            raise BundleError(problem_list(f"{self.path} is not as it was built", problems) + f"\n{_AGAIN}")

    def hold(self) -> bool:
        """Open every listed file; whether all are there."""
        complete = True
        for name in self.names if HOLDS_FOLDERS else ():
            try:
                self._held[name] = HeldFile(self._folder.open_file(name))
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR:
                    raise BundleError(
                        f"{self.path}: its {len(self.names)} files cannot be held open ({error.strerror}); close "
                        "bundles that are not needed, or allow the process more open files (ulimit -n)"
                    ) from error
                complete = False  # what is wrong with the file is said when it is asked for
        return complete

    @property
    def exchanged(self) -> bool:
        """Whether another folder, or none, is at :attr:`path` by now."""
        return self._folder.exchanged

    def close(self) -> None:
        """Close the folder and its files; nothing can be read any more. Closing twice is harmless."""
        self._closed = True
        for held in self._held.values():
            held.close()
        self._held.clear()
        self._verified.clear()
        self._folder.close()

    def _refuse(self, name: str, problem: str | None) -> None:
        if problem:
            raise BundleError(f"{name!r} in {self.path} {problem}; {_AGAIN}")

    def _refuse_other_place(self) -> None:
        """Refuse what is at the path if it is no longer the folder that was opened."""
        self._refuse_closed()
        if self._folder.exchanged:
            raise BundleError(f"{self.path} was replaced since it was opened: open it again, or repeat the command")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BundleError(f"{self.path} cannot be read: the bundle is closed; open it again")

    def _refuse_other_than_graph(self, name: str) -> None:
        of_targets = (target["graphs"].values() for target in self._manifest["targets"].values())
        known = sorted({entry["file"] for entry in self._manifest["graphs"]})
        if name not in known and not any(name in graphs for graphs in of_targets):
            raise BundleError(f"{name!r} is not a graph of {self.path}; its graphs are {', '.join(known) or '(none)'}")

    def _checked(self, name: str) -> Path:
        self._refuse_other_place()
        self._refuse(name, self._problem_of_name(name))
        return self.path / name

    def _checked_weights(self, name: str) -> set[str]:
        """Check the weight files of a (checked) graph; their names."""
        names = set(self._weights_of_entry(name))
        for weights in names:
            self._checked(weights)
        folder = posixpath.dirname(name)
        return names | {posixpath.join(folder, place) for place in self._refuse_external(name, self._problem_of_name)}

    def _weights_of_entry(self, name: str) -> list[str]:
        entries = (entry for entry in self._manifest["graphs"] if entry["file"] == name)
        return [entry["weights"] for entry in entries if entry["weights"] is not None]

    def _refuse_external(self, name: str, check: _Check) -> tuple[str, ...]:
        """Check what the (already verified) graph points at; give its locations."""
        problems = self._external_problems(name, check)
        if problems:
            raise BundleError(problem_list(f"the external data of {name!r} in {self.path}", problems))
        return tuple(dict.fromkeys(tensor.location for tensor in self._scanned[name][1]))

    def _all_problems(self) -> list[str]:
        problems: list[str] = []
        for name in self.names:
            problem = self._problem_of_name(name)
            if problem:
                problems.append(f"{name!r} {problem}")
            elif name.endswith(".onnx"):
                found = self._external_problems(name, self._problem_of_name)
                problems += [f"the external data of {name!r}: {text}" for text in found]
        try:
            tree = self._folder.tree()
        except OSError as error:
            return [*problems, f"cannot list {error.filename}: {error.strerror}"]
        listed = {MANIFEST_NAME, *self.names}
        problems += [f"{name!r} is not listed in {MANIFEST_NAME}" for name in tree.files if name not in listed]
        return [*problems, *tree.problems]

    def _problem_of_name(self, name: str) -> str | None:
        """Check the file that a name leads to now; remember it if it is valid."""
        held = self._held.get(name)
        if held is not None:
            problem = self._folder.problem(name)
            if problem:
                return problem
            with suppress(OSError):  # as _problem() will find it
                now, then = self._folder.state(name), held.state()
                if (now.device, now.inode) != (then.device, then.inode):
                    del self._held[name]
        return self._problem(name)

    def _problem(self, name: str) -> str | None:
        """Check one file, the one that is held; remember it if it is valid."""
        self._refuse_closed()
        entry = self._manifest["files"].get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self.names, n=1)
            return "is not listed in the manifest" + (f" (did you mean {close[0]!r}?)" if close else "")
        problem = name_problem(name)
        if problem:
            return problem
        try:
            if name not in self._held:
                problem = self._folder.problem(name)
                if problem:
                    return problem
                self._held[name] = HeldFile(self._folder.open_file(name))
            state = self._held[name].state()
            if self._verified.get(name) == state:
                return None
            if state.size != entry["size"]:
                return f"has {state.size} bytes, the manifest says {entry['size']}"
            digest, state = self._held[name].digest()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if digest != entry["sha256"]:
            return f"has SHA-256 {digest}, the manifest says {entry['sha256']}"
        self._verified[name] = state
        return None

    def _external_problems(self, name: str, check: _Check) -> list[str]:
        """Check every file that the (already verified) graph ``name`` points at."""
        try:
            tensors = self._external_tensors(name)
        except BundleError as error:
            return [str(error)]
        problems: list[str] = []
        for location, tensor in {tensor.location: tensor.tensor for tensor in reversed(tensors)}.items():
            reason = name_problem(location)
            # ONNX: a location is relative to the folder of the graph file
            problem = f"{reason}" if reason else check(posixpath.join(posixpath.dirname(name), location))
            if problem:
                problems.append(f"tensor {tensor!r} points at {location!r:.200}, which {problem}")
        return problems

    def _external_tensors(self, name: str) -> tuple[ExternalTensor, ...]:
        state, tensors = self._scanned.get(name, (None, ()))
        if state != self._verified[name]:
            with self._held[name].reader() as stream:
                tensors = external_tensors_of(stream, self.path / name)
            if self._held[name].state() != self._verified[name]:
                raise BundleError(f"{self.path / name} changed while it was read; {_AGAIN}")
            self._scanned[name] = (self._verified[name], tensors)
        return tensors
