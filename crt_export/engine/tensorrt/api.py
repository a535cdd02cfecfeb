"""TensorRT or TensorRT-RTX, imported or said to be missing; the names of their classes; what they log.

The classes are Any for the type checker, because they come from whichever of the two modules is installed. Code
annotates each runtime object with one of these names, so that a test can look up every attribute used in the
genuine bindings of every supported version.
"""

from __future__ import annotations

import importlib
from collections import deque
from typing import Any

from crt_export.environment import compile_need, compile_obstacle, find_dependency
from crt_export.errors import MissingDependencyError, UnsupportedError
from crt_export.machine import list_gpus
from crt_export.profile import EngineProfile

#: The module itself, tensorrt or tensorrt_rtx.
Api = Any
Builder = Any
EngineInspector = Any
IBuilderConfig = Any
ICudaEngine = Any
IExecutionContext = Any
IHostMemory = Any
ILayer = Any
ILogger = Any
INetworkDefinition = Any
IOptimizationProfile = Any
IRuntimeCache = Any
IRuntimeConfig = Any
ITensor = Any
OnnxParser = Any
ParserError = Any
Runtime = Any


def load_api(profile: EngineProfile) -> Api:
    """Import the runtime that a profile compiles with, after checking that it can compile here.

    Raises:
        MissingDependencyError: The package, its version or the GPU is missing; says what is needed.
        UnsupportedError: The runtime has no such architecture.
    """
    name = find_dependency(profile.runtime).module
    try:
        api: Api = importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"{need_of_profile(profile)}; {name} cannot be imported ({error})") from error
    obstacle = compile_obstacle(profile, api.__version__, list_gpus())
    if obstacle:
        raise MissingDependencyError(f"target {profile.name} needs {obstacle}")
    if profile.runtime == "tensorrt-rtx":
        _require_architecture_rtx(api, profile)
    return api


def _require_architecture_rtx(api: Api, profile: EngineProfile) -> None:
    known = [name for name in api.ComputeCapability.__members__ if name.startswith("SM")]
    if f"SM{profile.compute_capability}" not in known:
        raise UnsupportedError(
            f"target {profile.name}: TensorRT-RTX {api.__version__} compiles for {', '.join(known)}, "
            f"not SM{profile.compute_capability}"
        )


def need_of_profile(profile: EngineProfile) -> str:
    """Say what compiling a TensorRT or TensorRT-RTX profile needs."""
    return f"target {profile.name} needs {compile_need(profile)}"


class Log:
    """What TensorRT logged, in order; of a session, which may run for months, the newest only.

    Attributes:
        errors: Errors.
        warnings: Warnings.
        layer_text: The detailed layer list of a build.
    """

    def __init__(self, most: int | None = None) -> None:
        """Nothing yet; ``most`` limits how many errors and warnings are kept."""
        self.errors: deque[str] = deque(maxlen=most)
        self.warnings: deque[str] = deque(maxlen=most)
        self.layer_text = ""

    def take_errors(self) -> str:
        """The errors as one text, or that there were none; forgets them."""
        text = "; ".join(self.errors) or "no reason given"
        self.errors.clear()
        return text


def logger_from_log(api: Api, log: Log) -> ILogger:
    """Make a ``trt.ILogger`` that writes into ``log`` and prints nothing; it must outlive what it is given to.

    Native code calls it, possibly from its own threads, and cannot take an exception from it.
    """
    errors = (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR)

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)  # pybind11 refuses super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                log.errors.append(message)
            elif severity == api.ILogger.Severity.WARNING:
                log.warnings.append(message)
            elif severity == api.ILogger.Severity.VERBOSE and message.startswith("Layers:"):
                log.layer_text = message

    return Logger()
