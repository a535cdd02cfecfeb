"""Load TensorRT or TensorRT-RTX, or say what is missing; and the names of their classes.

The classes are Any for the type checker, because they come from whichever of the two modules is installed. Code
annotates each runtime object with one of these names, so that a test can look up every attribute used in the
genuine bindings of every supported version.
"""

from __future__ import annotations

import importlib
from typing import Any

from crt_export.errors import MissingDependencyError, UnsupportedError
from crt_export.gpu import list_gpus
from crt_export.profile import EngineProfile
from crt_export.profile_options import TensorRTOptions

#: The module itself, tensorrt or tensorrt_rtx.
Api = Any
Builder = Any
EngineInspector = Any
IBuilderConfig = Any
ICudaEngine = Any
IHostMemory = Any
ILayer = Any
ILogger = Any
INetworkDefinition = Any
IOptimizationProfile = Any
ITensor = Any
OnnxParser = Any
ParserError = Any
Runtime = Any

# Runtime of a profile -> (module, oldest version whose in-place cache update this package relies on).
_MODULES = {"tensorrt": ("tensorrt", (10, 16)), "tensorrt-rtx": ("tensorrt_rtx", (1, 7))}


def load_api(profile: EngineProfile) -> Api:
    """Import the runtime that a profile compiles with, after checking that it can compile here.

    Raises:
        MissingDependencyError: The package, its version or the GPU is missing; says what is needed.
        UnsupportedError: The runtime has no such architecture.
    """
    name, floor = _MODULES[profile.runtime]
    need = need_of_profile(profile)
    try:
        api: Api = importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"{need}; {name} cannot be imported ({error})") from error
    if tuple(int(part) for part in api.__version__.split(".")[:2]) < floor:
        raise MissingDependencyError(f"{need}; found {name} {api.__version__}")
    if profile.runtime == "tensorrt":
        _require_gpu(profile)
    else:
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
    version = ".".join(map(str, _MODULES[profile.runtime][1]))
    if profile.runtime == "tensorrt-rtx":
        return (
            f"target {profile.name} needs tensorrt-rtx {version} or newer: pip install 'crt-export[rtx]' on "
            "Linux x86_64 (no GPU needed to compile)"
        )
    newer = " or newer" if is_ampere_plus(profile) else ""
    return (
        f"target {profile.name} needs tensorrt {version} or newer (pip install 'crt-export[tensorrt]') and an "
        f"NVIDIA GPU of compute capability {_dotted(profile.compute_capability)}{newer}, because TensorRT times "
        "kernels on it while it builds (rtx-* targets compile without a GPU)"
    )


def is_ampere_plus(profile: EngineProfile) -> bool:
    """Whether the engine must also run on GPUs newer than SM 8.0, and may be built on one."""
    return isinstance(profile.options, TensorRTOptions) and profile.options.ampere_plus


def _require_gpu(profile: EngineProfile) -> None:
    gpus, wanted = list_gpus(), profile.compute_capability
    if not gpus:
        raise MissingDependencyError(f"{need_of_profile(profile)}; this machine has no usable NVIDIA GPU")
    found = gpus[0].compute_capability  # TensorRT builds on the current device, which is the first one
    newer_will_do = is_ampere_plus(profile) and wanted is not None and found > wanted
    if found != wanted and not newer_will_do:
        raise MissingDependencyError(
            f"{need_of_profile(profile)}; this machine's first GPU is {gpus[0].name}, {_dotted(found)}"
        )


def _dotted(capability: int | None) -> str:
    return "unknown" if capability is None else f"{capability // 10}.{capability % 10}"
