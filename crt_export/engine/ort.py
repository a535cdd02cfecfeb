"""ONNX Runtime as a guest of this process: imported with its telemetry off, and harmless to children that are forked.

Wheels from 1.29 on carry a telemetry that is on by default: as soon as the module is imported it writes a device id
and a store of events under ``~/.cache/Microsoft``, and a thread of its own sends them. ``ORT_DISABLE_TELEMETRY=1``
switches it off, and is read once, while the library loads: ``disable_telemetry_events()`` comes too late (tried with
1.31.1). Every import of ONNX Runtime in this package goes through :func:`import_library`.

``fork`` copies no threads, and ONNX Runtime waits for its threads when a session ends. A child that only ends would
therefore wait for ever for the threads of its parent's sessions; so it keeps them until the system takes them back.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from typing import Any, Protocol
from weakref import WeakSet

from crt_export.environment import ORT_CONFLICT, installed_onnxruntime_wheels, onnxruntime_distributions
from crt_export.errors import (
    MissingDependencyError,
)

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
#: Device to the execution provider that computes there.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Forked(Protocol):
    """What must know that it is in a child now."""

    @property
    def native(self) -> object:
        """The object whose end would wait for threads that are not there."""
        ...

    def left_behind(self) -> None:
        """Called once in the child."""
        ...


_OPEN: WeakSet[Any] = WeakSet()


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


def survive_fork(graph: Forked) -> None:
    """Have a forked child keep a graph's native session, and tell the graph."""
    _OPEN.add(graph)


def _in_child() -> None:
    for graph in list(_OPEN):
        # Never released, not even when the interpreter ends and clears every module.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph.native))
        graph.left_behind()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_in_child)


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
