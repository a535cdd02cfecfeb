"""This machine: optional packages and their versions, GPUs, and which targets can be built and run with them.

Nothing heavy is imported to find out: packages are looked up, not loaded. The metadata of a distribution says its
version where there is one. A frozen application has modules and no metadata, and the module ``onnxruntime`` comes from
several distributions (onnxruntime-openvino, -directml, -qnn, ort-nightly, ...): what can be imported is installed,
whatever it is called.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from crt_export.errors import MissingDependencyError
from crt_export.machine import Gpu, list_gpus
from crt_export.profile import EngineProfile

_ORT = "onnxruntime"
ORT_CONFLICT = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
    "pip uninstall onnxruntime onnxruntime-gpu, then install crt-export[cpu] or crt-export[cuda], not both"
)
#: The version of a module that can be imported and does not say which it is.
UNKNOWN = "unknown"
_VERSION = re.compile(r"""^__version__\s*(?::\s*str\s*)?=\s*["']([^"']+)["']""", re.M)


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """An optional package.

    Attributes:
        distribution: Name to install.
        module: Name to import.
        extra: The extra of crt-export that installs it.
        minimum: Oldest version that works.
        purpose: What cannot be done without it.
    """

    distribution: str
    module: str
    extra: str
    minimum: tuple[int, ...]
    purpose: str

    @property
    def version(self) -> str | None:
        """The installed version, None where the package is absent; a module without metadata counts as well."""
        version = distribution_version(self.distribution)
        if version is None and self.module != _ORT:
            return module_version(self.module)
        if version is None and self.distribution == _ORT and other_onnxruntime() is not None:
            return module_version(_ORT)
        return version

    @property
    def install(self) -> str:
        """How to get it; empty where it is installed."""
        if self.version is not None:
            return ""
        if self.module == _ORT and module_spec(_ORT) is not None:
            return f"only in place of {' and '.join(onnxruntime_distributions())}"
        return f"pip install 'crt-export[{self.extra}]'"

    @property
    def usable(self) -> bool:
        """Whether it is installed, importable and new enough."""
        version = self.version
        return version is not None and _suffices(version, self.minimum) and module_spec(self.module) is not None


def _dependency(distribution: str, module: str, extra: str, minimum: tuple[int, ...], purpose: str) -> Dependency:
    return Dependency(distribution=distribution, module=module, extra=extra, minimum=minimum, purpose=purpose)


DEPENDENCIES = (
    _dependency("torch", "torch", "export", (2, 13), "build, validate: the reference model and the export"),
    _dependency("onnx", "onnx", "export", (1, 21), "build: the graph format"),
    _dependency("onnx-ir", "onnx_ir", "export", (1, 0), "build: graph passes"),
    _dependency("onnxscript", "onnxscript", "export", (0, 7), "build: the exporter's operators"),
    _dependency("polygraphy", "polygraphy", "export", (0, 53), "validate --save-outputs"),
    _dependency("scipy", "scipy", "export", (1, 14), "build, validate: confidence intervals"),
    _dependency("tokenizers", "tokenizers", "text", (0, 21), "models with a tokenizer.json"),
    _dependency("jinja2", "jinja2", "report", (3, 1), "report, validate --html: the page"),
    _dependency("matplotlib", "matplotlib", "report", (3, 9), "report, validate --html: its plots"),
    _dependency("jsonschema", "jsonschema", "report", (4, 23), "report, validate --html: reports against their schema"),
    _dependency("model-signing", "model_signing", "sign", (1, 1), "sign, verify: signatures of bundles"),
    _dependency("onnxruntime", "onnxruntime", "cpu", (1, 24), "ort-cpu-* targets"),
    _dependency("onnxruntime-gpu", "onnxruntime", "cuda", (1, 24), "ort-cuda-* targets (and ort-cpu-*)"),
    _dependency("tensorrt", "tensorrt", "tensorrt", (10, 16), "trt-* targets"),
    _dependency("tensorrt-rtx", "tensorrt_rtx", "rtx", (1, 7), "rtx-* targets"),
    _dependency("cuda-bindings", "cuda.bindings", "rtx", (13,), "running trt-* and rtx-* engines (also in tensorrt)"),
)


@dataclass(frozen=True, kw_only=True)
class TargetStatus:
    """What this machine can do with a target.

    Attributes:
        profile: The target.
        status: ``run`` (build and run it), ``compile`` (build it; its engine does not run here) or ``needs``.
        needs: What is missing, empty unless the status is ``needs``.
    """

    profile: EngineProfile
    status: str
    needs: tuple[str, ...] = ()


def target_status(profile: EngineProfile) -> TargetStatus:
    """Judge one target against the packages and GPUs of this machine."""
    if profile.runtime == "onnxruntime":
        needs = _ort_needs(profile)
        ability = "run"
    else:
        dependency = find_dependency(profile.runtime)
        importable = module_spec(dependency.module) is not None
        obstacle = compile_obstacle(profile, dependency.version if importable else None, gpus())
        needs = [obstacle] if obstacle else []
        ability = "compile" if run_obstacles(profile, gpus()) else "run"
    return TargetStatus(profile=profile, status="needs" if needs else ability, needs=tuple(needs))


def installed_onnxruntime_wheels() -> tuple[str, ...]:
    """Which of this package's two wheels that share the module ``onnxruntime`` are installed; two are one too many."""
    return tuple(name for name in (_ORT, f"{_ORT}-gpu") if distribution_version(name) is not None)


def other_onnxruntime() -> str | None:
    """Where the module ``onnxruntime`` comes from, if from neither of the two wheels; None if it cannot be imported."""
    if installed_onnxruntime_wheels() or module_spec(_ORT) is None:
        return None
    return " and ".join(distributions_of(_ORT)) or _ORT


def onnxruntime_distributions() -> tuple[str, ...]:
    """Every distribution that is installed and holds the module ``onnxruntime``."""
    if module_spec(_ORT) is None:
        return installed_onnxruntime_wheels()
    return tuple(sorted({*installed_onnxruntime_wheels(), *distributions_of(_ORT)})) or (_ORT,)


def environment_problems() -> list[str]:
    """What is wrong with this installation, one actionable sentence each; empty when nothing is."""
    problems = [ORT_CONFLICT] if len(installed_onnxruntime_wheels()) == 2 else []
    for dependency in DEPENDENCIES:
        version = dependency.version
        if version is not None and not _suffices(version, dependency.minimum):
            least = ".".join(map(str, dependency.minimum))
            problems.append(
                f"{dependency.distribution} {version} is too old, {least} is needed: "
                f"pip install --upgrade 'crt-export[{dependency.extra}]'"
            )
    return problems


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, by name."""
    modules = {dependency.distribution: dependency for dependency in DEPENDENCIES}
    found = {name: modules[name].version if name in modules else distribution_version(name) for name in distributions}
    return {name: version for name, version in found.items() if version is not None}


def find_dependency(distribution: str) -> Dependency:
    """Return the optional package of this name."""
    return next(dependency for dependency in DEPENDENCIES if dependency.distribution == distribution)


def compile_need(profile: EngineProfile) -> str:
    """Say what compiling a TensorRT or TensorRT-RTX profile takes: package, oldest version, and GPU."""
    dependency = find_dependency(profile.runtime)
    package = f"{dependency.distribution} {'.'.join(map(str, dependency.minimum))} or newer"
    install = f"pip install 'crt-export[{dependency.extra}]'"
    if profile.runtime == "tensorrt-rtx":
        return f"{package} on Linux x86_64 ({install}; no GPU needed to compile)"
    newer = " or newer" if profile.ampere_plus else ""
    return (
        f"{package} ({install}) and an NVIDIA GPU of compute capability {dotted(profile.compute_capability)}{newer}, "
        "because TensorRT times kernels on it while it builds (rtx-* targets compile without a GPU)"
    )


def compile_obstacle(profile: EngineProfile, version: str | None, devices: Sequence[Gpu]) -> str | None:
    """What keeps a TensorRT or TensorRT-RTX profile from being compiled, after what it takes.

    Args:
        profile: The profile.
        version: Installed version of its compiler, None where it is absent.
        devices: The GPUs of the machine; TensorRT builds on the first one.

    Returns:
        One sentence, None where nothing is in the way.
    """
    dependency = find_dependency(profile.runtime)
    found = []
    if version is None:
        found.append(f"{dependency.distribution} is not installed")
    elif not _suffices(version, dependency.minimum):
        found.append(f"found {dependency.distribution} {version}")
    if profile.runtime == "tensorrt":
        found += _gpu_obstacle(profile, devices)
    return f"{compile_need(profile)}; {' and '.join(found)}" if found else None


def run_obstacles(profile: EngineProfile, devices: Sequence[Gpu]) -> list[str]:
    """What this machine lacks to run a compiled engine, one actionable phrase each; empty when nothing is.

    Args:
        profile: A TensorRT or TensorRT-RTX profile.
        devices: The GPUs of the machine; engines run on the first one.
    """
    runtime = find_dependency(profile.runtime)
    found = []
    for dependency in (runtime, find_dependency("cuda-bindings")):
        if not dependency.usable:
            least = ".".join(map(str, dependency.minimum))
            version = f"found {dependency.version}" if dependency.version else "it is not installed"
            install = f"pip install 'crt-export[{runtime.extra}]'"
            found.append(f"{dependency.distribution} {least} or newer, {version}: {install}")
    obstacle = _gpu_obstacle(profile, devices)
    if obstacle:
        newer = " or newer" if profile.ampere_plus else ""
        capability = dotted(profile.compute_capability)
        found.append(f"an NVIDIA GPU of compute capability {capability}{newer}; {obstacle[0]}")
    return found


def _gpu_obstacle(profile: EngineProfile, devices: Sequence[Gpu]) -> list[str]:
    if not devices:
        return ["this machine has no usable NVIDIA GPU"]
    found, wanted = devices[0].compute_capability, profile.compute_capability
    newer_will_do = profile.ampere_plus and wanted is not None and found > wanted
    return (
        [] if found == wanted or newer_will_do else [f"this machine's first GPU is {devices[0].name}, {dotted(found)}"]
    )


def require_extra(distributions: Iterable[str], purpose: str) -> None:
    """Refuse to begin where optional packages are missing; nothing is imported to find out.

    Args:
        distributions: Names of ``DEPENDENCIES``, all of one extra.
        purpose: What needs them.

    Raises:
        MissingDependencyError: One is missing or too old; names all of them and the extra.
    """
    unusable = [dependency for dependency in map(find_dependency, distributions) if not dependency.usable]
    if unusable:
        found = ", ".join(
            f"{dependency.distribution} {'.'.join(map(str, dependency.minimum))} or newer"
            f" ({f'found {dependency.version}' if dependency.version else 'not installed'})"
            for dependency in unusable
        )
        raise MissingDependencyError(f"{purpose} needs {found}: pip install 'crt-export[{unusable[0].extra}]'")


def missing_module_error(module: str | None, purpose: str) -> MissingDependencyError | None:
    """Explain a failed import of an optional package.

    Args:
        module: The module that was not found, dotted names included.
        purpose: What needed it.

    Returns:
        The error to raise, None where the module belongs to no optional package.
    """
    top = (module or "").split(".")[0]
    for dependency in DEPENDENCIES:
        if dependency.module == top:
            return MissingDependencyError(
                f"{purpose} needs {dependency.distribution}, which is not installed: "
                f"pip install 'crt-export[{dependency.extra}]'"
            )
    return None


@cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, asked for once."""
    return list_gpus()


def _ort_needs(profile: EngineProfile) -> list[str]:
    wheels = installed_onnxruntime_wheels()
    if len(wheels) == 2:
        return [ORT_CONFLICT]
    other = other_onnxruntime()
    if profile.device == "cpu":
        usable = any(find_dependency(name).usable for name in wheels or (_ORT,))
        return [] if usable else ["onnxruntime: pip install 'crt-export[cpu]'"]
    needs = []
    if not find_dependency("onnxruntime-gpu").usable and (other is None or not _has_cuda_provider()):
        here = " and ".join(onnxruntime_distributions())
        needs.append(f"onnxruntime-gpu{f' in place of {here}' if here else ''}: pip install 'crt-export[cuda]'")
    if not gpus():
        needs.append("an NVIDIA GPU")
    return needs


def _has_cuda_provider() -> bool:
    """Whether the module ``onnxruntime``, whatever it is called as a package, holds NVIDIA's provider."""
    spec = module_spec(_ORT)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "capi"
    return folder is not None and any(folder.glob("*onnxruntime_providers_cuda.*"))


def _suffices(version: str, minimum: tuple[int, ...]) -> bool:
    """Whether a version is new enough; one that says nothing is given the benefit of the doubt."""
    return version == UNKNOWN or _numbers(version) >= minimum


def dotted(capability: int | None) -> str:
    """A compute capability as NVIDIA writes it: 8.0 for 80."""
    return "unknown" if capability is None else f"{capability // 10}.{capability % 10}"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` gives (2, 13, 0)."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()


def distribution_version(distribution: str) -> str | None:
    """The version in a distribution's metadata; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_version(module: str) -> str | None:
    """The version that a module's own source states, ``unknown`` if it does not; None if it cannot be imported."""
    spec = module_spec(module)
    if spec is None:
        return None
    found = _VERSION.search(_source(spec))
    return found[1] if found else UNKNOWN


def module_spec(module: str) -> ModuleSpec | None:
    """Where a module would be imported from; None if nowhere. A folder of that name alone is no module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent is missing; a module without a specification
        return None
    return None if spec is None or spec.origin is None else spec


def distributions_of(module: str) -> tuple[str, ...]:
    """The distributions whose metadata claim a module, in alphabetical order."""
    return tuple(sorted(set(_claims().get(module, ()))))


@cache
def _claims() -> dict[str, list[str]]:
    return {module: list(names) for module, names in importlib.metadata.packages_distributions().items()}


def _source(spec: ModuleSpec) -> str:
    """The module's own text; empty where it has none, as compiled and frozen ones."""
    read = getattr(spec.loader, "get_source", None)
    try:
        return (read(spec.name) if read is not None else None) or ""
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return ""
