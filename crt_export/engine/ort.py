"""ONNX Runtime as a guest of this process: its import, and the sessions it makes.

Wheels from 1.29 on carry a telemetry that is on by default: as soon as the module is imported it writes a device id
and a store of events under ``~/.cache/Microsoft``, and a thread of its own sends them. ``ORT_DISABLE_TELEMETRY=1``
switches it off, and is read once, while the library loads: ``disable_telemetry_events()`` comes too late (tried with
1.31.1). Every import of ONNX Runtime in this package goes through :func:`import_library`.

The bytes of a bundle that were hashed are the bytes that are loaded. A held graph is given as bytes. Its weights ONNX
Runtime maps from their file, below the folder that is held open, packs most of them into memory of its own, and what
stays mapped becomes a private copy. That takes no more memory and time than loading by path does; given as bytes as
well, the weights would take 2.6 times their size while they are loaded, and twice the time (629 MB, D=5: 1,588 MiB
against 653). So this is done only where mappings cannot be replaced, or where the file or the folder was touched
meanwhile: then it is read, hashed and loaded from memory.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from crt_export.bundle import HeldGraph
from crt_export.checked import Checked, Rules, choice, whole
from crt_export.engine.memory_map import REPLACES_MAPPINGS, allocated_in_huge_pages, make_private, mappings_of
from crt_export.environment import ORT_CONFLICT, installed_onnxruntime_wheels, onnxruntime_distributions
from crt_export.errors import ContractError, CrtExportError, MissingDependencyError
from crt_export.exclusive import Exclusive
from crt_export.profile_options import OrtOptions

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
#: Device to the execution provider that computes there.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_library() -> Any:
    """Import ``onnxruntime`` with its telemetry off.

    An application that imported it earlier has decided for itself, and so has a user who gave
    ``ORT_DISABLE_TELEMETRY`` a value, ``0`` included.

    Raises:
        ImportError: It is not installed, or cannot be loaded.
    """
    if "onnxruntime" not in sys.modules and not os.environ.get(TELEMETRY_SWITCH):
        os.environ[TELEMETRY_SWITCH] = "1"
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, Exception):
            raise error.__cause__ from None  # Ctrl-C while its own code ran, which says "initialization failed"
        raise


def import_onnxruntime(device: str = "cpu") -> Any:
    """Import ONNX Runtime after checking that exactly one build is installed, and the one the device needs.

    Raises:
        MissingDependencyError: None or both are installed, or the installed one cannot use the device.
    """
    extra = "cuda" if device == "cuda" else "cpu"
    if len(installed_onnxruntime_wheels()) > 1:
        raise MissingDependencyError(f"{ORT_CONFLICT}; this target needs crt-export[{extra}]")
    try:
        library = import_library()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            reason = f"which is not installed ({error}): pip install 'crt-export[{extra}]'"
        else:  # advice to install one would put it over what is there
            here = " and ".join(onnxruntime_distributions())
            reason = f"and {here}, which is installed, cannot be loaded ({error}): mend or replace it"
        raise MissingDependencyError(f"this needs ONNX Runtime, {reason}") from error
    if PROVIDERS[device] not in library.get_available_providers():
        raise MissingDependencyError(
            f"the installed onnxruntime {library.__version__} has no {PROVIDERS[device]}: "
            "pip uninstall onnxruntime, then pip install 'crt-export[cuda]'"
        )
    return library


_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_BLOCK_BASE = "4"
_FATAL = 4  # ONNX Runtime's severity scale: errors reach the caller as exceptions, so nothing is printed as well


@dataclass(frozen=True, kw_only=True)
class OrtSettings(Checked):
    """How graphs are loaded.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of one graph; 0 takes every core.
        options: What a profile says about it.

    Raises:
        InputError: A value is impossible.
    """

    HEADING: ClassVar[str] = "ONNX Runtime settings"
    RULES: ClassVar[Rules] = {
        "device": choice(*PROVIDERS),
        "threads": whole("a number of at least 0 (0 takes every core)", least=0),
    }

    device: str = "cpu"
    threads: int = 0
    options: OrtOptions = field(default_factory=OrtOptions)


def open_session(library: Any, graph: Path | HeldGraph, settings: OrtSettings, *, stop_spinning: bool) -> Any:
    """Make the InferenceSession of one ONNX file.

    Args:
        library: The module ``onnxruntime``, see import_onnxruntime().
        graph: A graph of a bundle; or a file, whose external data is read from its folder.
        settings: How to load it.
        stop_spinning: Its threads sleep as soon as a call ends, whatever the settings say.

    Raises:
        MissingDependencyError: The device cannot be used.
        ContractError: The file is missing or ONNX Runtime refuses it.
    """
    path = graph if isinstance(graph, Path) else graph.path
    if isinstance(graph, Path) and not path.is_file():
        raise ContractError(f"{path}: expected an ONNX file, found {'a folder' if path.exists() else 'nothing'}")
    provider = PROVIDERS[settings.device]

    def load(model: str | bytes, entries: Mapping[str, str], contents: Mapping[str, Any]) -> Any:
        options = _session_options(library, settings, stop_spinning=stop_spinning)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if contents:
            names, files = list(contents), list(contents.values())
            options.add_external_initializers_from_files_in_memory(names, files, [len(file) for file in files])
        with allocated_in_huge_pages(settings.options.huge_pages and settings.device == "cpu"):
            return library.InferenceSession(
                model,
                sess_options=options,
                providers=[provider],
                disabled_optimizers=list(settings.options.disabled_optimizers) or None,
            )

    try:
        if isinstance(graph, Path):
            session = load(str(path), {}, {})
        else:
            session = load_held_graph(graph, load, keep_mapped=settings.options.mmap)
    except CrtExportError:
        raise
    except Exception as error:  # ONNX Runtime raises RuntimeError or one of a dozen classes of its own
        raise ContractError(f"{path}: ONNX Runtime cannot load it ({error})") from error
    if provider not in session.get_providers():
        raise MissingDependencyError(
            f"ONNX Runtime could not start {provider}: check the NVIDIA driver and the CUDA libraries of "
            "crt-export[cuda], or choose an ort-cpu target"
        )
    return session


def _session_options(library: Any, settings: OrtSettings, *, stop_spinning: bool) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(
        library.GraphOptimizationLevel, _LEVELS[settings.options.graph_optimization]
    )
    # Threads take a loop in ever smaller pieces, so that one which is held up does not keep the others waiting.
    options.add_session_config_entry("session.dynamic_block_base", _BLOCK_BASE)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.options.spinning else "0")
    # W8A8 graphs multiply what they dequantise, in float. Fused, ONNX Runtime would multiply uint8 by int8, and without
    # VNNI pairs of products are added in 16 bits that saturate: 4 % of the demo's logits, on some CPUs only.
    # session.x64quantprecision, meant for that, breaks graphs that use a weight twice (as of 1.31.1).
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if stop_spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


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
