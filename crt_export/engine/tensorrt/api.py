"""Load TensorRT or TensorRT-RTX, or say what is missing; and the names of their classes.

The classes are Any for the type checker, because they come from whichever of the two modules is installed. Code
annotates each runtime object with one of these names, so that a test can look up every attribute used in the
genuine bindings of every supported version.
"""

from __future__ import annotations

import importlib
from typing import Any

from crt_export.environment import compile_need, compile_obstacle, find_dependency
from crt_export.environment import is_ampere_plus as is_ampere_plus
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
