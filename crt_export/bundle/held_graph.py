"""A graph of a bundle as a runtime may load it: its bytes, and the weight files it points at, held open."""

from __future__ import annotations

import errno
import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crt_export.bundle.held import HeldFile
from crt_export.bundle.paths import FileState
from crt_export.errors import BundleError

_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class HeldWeights:
    """A weight file whose content was compared with the manifest.

    Attributes:
        path: What messages call it.
        file: The open file.
        state: What ``fstat`` said while it was hashed.
        sha256: Digest of the content, lower-case hex.
    """

    path: Path
    file: HeldFile
    state: FileState
    sha256: str

    @property
    def unchanged(self) -> bool:
        """Whether the file is as it was hashed; a rename or a removal, which leave the content, count as changes."""
        return self.file.state() == self.state

    def private_copy(self) -> mmap.mmap:
        """The content in memory of this process, hashed as it was read.

        Raises:
            BundleError: It is no longer what the manifest says.
        """
        content = mmap.mmap(-1, max(1, self.state.size))
        digest = hashlib.sha256()
        try:
            with self.file.reader() as stream, memoryview(content) as view:
                for begin in range(0, self.state.size, _PIECE):
                    piece = view[begin : min(begin + _PIECE, self.state.size)]
                    if stream.readinto(piece) != len(piece):
                        raise OSError(errno.ESTALE, "became shorter")
                    digest.update(piece)
                    piece.release()
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read ({error.strerror})") from error
        if digest.hexdigest() != self.sha256:
            raise BundleError(f"{self.path} was changed while it was loaded; restore the bundle or build it again")
        return content


@dataclass(frozen=True, kw_only=True)
class HeldGraph:
    """A checked graph.

    Attributes:
        path: What messages call it.
        model: Content of the .onnx file, the very bytes that were hashed and searched.
        folder: Where the locations of its weights are looked up; leads to the held folder, not to its name.
        weights: Location in the graph to weight file.
    """

    path: Path
    model: bytes
    folder: Path
    weights: Mapping[str, HeldWeights]

    @property
    def unchanged(self) -> bool:
        """Whether every weight file is as it was hashed."""
        return all(weights.unchanged for weights in self.weights.values())
