"""The sidecar of an engine: what the file says about itself, checked before TensorRT sees the engine.

TensorRT answers an engine of another version, GPU or shape with a line in its log at best. The sidecar, which the
build wrote beside the engine, answers with what is wrong and how to fix it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_export.environment import dotted, find_dependency
from crt_export.errors import BundleError, ContractError, MissingDependencyError, problem_list
from crt_export.machine import Gpu
from crt_export.profile import EngineProfile
from crt_export.spec import GraphSpec, interface_problems
from crt_export.strict_json import parse_json

_KEYS: dict[str, type] = {
    "graph": str,
    "unroll": int,
    "runtime": str,
    "runtime_version": str,
    "compute_capability": int,
    "precision": str,
    "capacity": int,
    "options": dict,
    "inputs": list,
    "outputs": list,
    "aliases": list,
}


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """An engine of a bundle, its files checked against the manifest.

    Attributes:
        graph: ``step``, ``prefill`` or ``prefill_pass``.
        path: What messages call the serialised engine.
        sidecar: What they call the JSON file beside it.
        read_plan: Gives the engine's bytes, checked.
        read_sidecar: Gives the JSON file's bytes, checked.
        contract: What the graph must read and write: dims as in the glossary, the cache's capacity a number.
        unroll: Passes the graph must hold.
    """

    graph: str
    path: Path
    sidecar: Path
    read_plan: Callable[[], bytes]
    read_sidecar: Callable[[], bytes]
    contract: GraphSpec
    unroll: int


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What the session needs of a sidecar that passed every check.

    Attributes:
        contract: Inputs, outputs and aliases of the engine.
        least: Smallest shape per input.
        most: Largest shape per input.
    """

    contract: GraphSpec
    least: Mapping[str, tuple[int, ...]]
    most: Mapping[str, tuple[int, ...]]


def read_sidecar(file: EngineFile, profile: EngineProfile, gpu: Gpu, version: str) -> EngineFacts:
    """Check one engine against its target, this machine's GPU and the installed runtime.

    Args:
        file: The engine.
        profile: The target's profile, as the bundle's manifest has it.
        gpu: The GPU to run on.
        version: Version of the installed TensorRT or TensorRT-RTX.

    Raises:
        BundleError: The sidecar is damaged, or belongs to another graph, target or model.
        MissingDependencyError: The engine needs another version of the runtime, or another GPU.
    """
    values = _parsed(file)
    problems = [*_target_problems(values, file, profile)]
    try:
        contract = GraphSpec.from_dict(file.graph, values)
        limits = {side: _shapes(values["inputs"], side) for side in ("min", "opt", "max")}
    except (ContractError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{file.sidecar}: its inputs and outputs cannot be read ({error!r}); {_again()}") from None
    problems += interface_problems(file.contract, contract)
    if set(contract.aliases) != set(file.contract.aliases):
        problems.append(f"in-place updates {sorted(file.contract.aliases)} expected, {sorted(contract.aliases)} found")
    if problems:
        raise BundleError(problem_list(f"{file.sidecar} does not fit {profile.name}", problems) + f"\n{_again()}")
    needs = [*_version_problems(values, profile, version), *_gpu_problems(values, profile, gpu)]
    if needs:
        raise MissingDependencyError(problem_list(f"{file.path} cannot run on this machine", needs))
    return EngineFacts(contract=contract, least=limits["min"], most=limits["max"])


def _parsed(file: EngineFile) -> dict[str, Any]:
    path = file.sidecar
    try:
        values = parse_json(file.read_sidecar())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected the facts about an engine as JSON ({error}); {_again()}") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(values).__name__}; {_again()}")
    problems = [
        f"{key!r} must be {kind.__name__}, found {values.get(key)!r:.60}"
        for key, kind in _KEYS.items()
        if not isinstance(values.get(key), kind) or isinstance(values.get(key), bool)
    ]
    options = values.get("options")
    if isinstance(options, dict):
        problems += [
            f"options[{key!r}] must be true or false, found {options.get(key)!r:.60}"
            for key in ("ampere_plus", "version_compatible")
            if not isinstance(options.get(key, False if key == "version_compatible" else None), bool)
        ]
    if problems:
        raise BundleError(problem_list(str(path), problems) + f"\n{_again()}")
    return values


def _target_problems(values: Mapping[str, Any], file: EngineFile, profile: EngineProfile) -> Iterator[str]:
    expected = {
        "graph": file.graph,
        "unroll": file.unroll,
        "runtime": profile.runtime,
        "precision": profile.precision,
        "capacity": profile.capacity,
        "compute_capability": profile.compute_capability,
    }
    yield from (
        f"{key} {wanted!r} expected, {values[key]!r} found" for key, wanted in expected.items() if values[key] != wanted
    )


def _version_problems(values: Mapping[str, Any], profile: EngineProfile, version: str) -> Iterator[str]:
    """An engine runs with the version that built it; a version-compatible one with later ones of the same major."""
    built = values["runtime_version"]
    if version == built or (profile.version_compatible and _is_later(version, built)):
        return
    package = find_dependency(profile.runtime).distribution
    yield (
        f"it was built with {package} {built}, {version} is installed: pip install '{package}=={built}', or build "
        "the bundle again with the installed version"
    )


def _is_later(version: str, built: str) -> bool:
    try:
        here, there = ([int(part) for part in text.split(".")] for text in (version, built))
    except ValueError:
        return False
    return here[0] == there[0] and here >= there


def _gpu_problems(values: Mapping[str, Any], profile: EngineProfile, gpu: Gpu) -> Iterator[str]:
    built = values["compute_capability"]
    if gpu.compute_capability == built or (profile.ampere_plus and gpu.compute_capability > built):
        return
    newer = " or newer" if profile.ampere_plus else ""
    yield (
        f"it was compiled for compute capability {dotted(built)}{newer}, the GPU is {gpu.name}, "
        f"{dotted(gpu.compute_capability)}: build for a profile with compute_capability = {gpu.compute_capability} "
        "(engines/README.md), or use an ort-cuda target"
    )


def _shapes(inputs: Sequence[Mapping[str, Any]], side: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in inputs:
        sizes, dims = entry[side], entry["dims"]
        if not isinstance(sizes, list) or len(sizes) != len(dims) or not all(_is_size(size) for size in sizes):
            raise ValueError(f"{side} of {entry['name']} must be {len(dims)} sizes of 1 or more, found {sizes!r:.60}")
        if str(entry["name"]) in shapes:
            raise ValueError(f"the input {entry['name']} stands twice")
        shapes[str(entry["name"])] = tuple(sizes)
    return shapes


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _again() -> str:
    return "the bundle was changed after it was built; build it again or restore it from its source"
