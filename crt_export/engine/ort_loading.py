"""From a held graph of a bundle to a session of ONNX Runtime: the bytes that were hashed are the bytes that are loaded.

The graph is given as bytes. Its weights ONNX Runtime maps from their file, below the folder that is held open, packs
most of them into memory of its own, and what stays mapped becomes a private copy. That takes no more memory and time
than loading by path does; given as bytes as well, the weights would take 2.6 times their size while they are loaded,
and twice the time (629 MB, D=5: 1,588 MiB against 653). So this is done only where mappings cannot be replaced, or
where the file or the folder was touched meanwhile: then it is read, hashed and loaded from memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from crt_export.bundle import HeldGraph
from crt_export.engine.private_weights import REPLACES_MAPPINGS, make_private, mappings_of
from crt_export.exclusive import Exclusive

#: Config entry that says where a graph given as bytes finds its external data.
_FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"

#: Makes a session of a graph's bytes, further config entries, and file contents by location.
Load = Callable[[bytes, Mapping[str, str], Mapping[str, mmap.mmap]], Any]

#: Between finding a mapping and replacing it nobody may unmap it, as another session that is being loaded would.
_LOADING = Exclusive("loading of weights")


def load_held_graph(graph: HeldGraph, load: Load, *, keep_mapped: bool) -> Any:
    """Make a session.

    Args:
        graph: The checked graph.
        load: Makes it, or raises whatever ONNX Runtime does.
        keep_mapped: Whether weights may stay mapped from their file.

    Raises:
        BundleError: A weight file is no longer what the manifest says.
        InputError: This is a signal handler, say, which has interrupted another loading in this very thread.
    """
    if not graph.weights:
        return load(graph.model, {}, {})
    session = None
    if keep_mapped or REPLACES_MAPPINGS:
        session = _LOADING.wait(_from_mapped, graph, load, keep_mapped)
    return _from_memory(graph, load) if session is None else session


def _from_mapped(graph: HeldGraph, load: Load, keep_mapped: bool) -> Any:
    """A session, or None where a file was touched meanwhile or its mappings cannot be replaced."""
    files = [weights.file.descriptor for weights in graph.weights.values()]
    try:
        before = {} if keep_mapped else {file: mappings_of(file) for file in files}
    except OSError:
        return None
    try:
        session = load(graph.model, {_FOLDER_ENTRY: str(graph.folder)}, {})
    except Exception:  # what is wrong with the graph shows again; that the folder was renamed meanwhile does not
        return None
    try:
        for file, mappings in before.items():
            make_private(file, mappings)
    except OSError:
        return None
    return session if graph.unchanged else None


def _from_memory(graph: HeldGraph, load: Load) -> Any:
    contents = {location: weights.private_copy() for location, weights in graph.weights.items()}
    try:
        return load(graph.model, {}, contents)
    finally:
        for content in contents.values():
            with suppress(BufferError):  # the session options that were given it may not be gone yet
                content.close()
        _give_back_memory()


def _give_back_memory() -> None:
    """Return what the C library keeps of the copies that ONNX Runtime made and freed; only glibc can be asked to."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
