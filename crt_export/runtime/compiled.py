"""Open the compiled engines of a TensorRT or TensorRT-RTX target."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from crt_export.bundle import BundleFiles
from crt_export.config import ModelConfig
from crt_export.engine.base import Engine
from crt_export.engine.tensorrt.engine import TensorRTEngine, machine_of_profile
from crt_export.engine.tensorrt.loading import Machine
from crt_export.engine.tensorrt.sidecar import EngineFile
from crt_export.errors import BundleError
from crt_export.spec import graph_spec

if TYPE_CHECKING:
    from crt_export.runtime.opening import Target

#: Without these there is no session; further engines of the target are loaded too.
_NEEDED = ("step", "prefill")


def compiled_engine(files: BundleFiles, target: Target, config: ModelConfig, machine: Machine | None = None) -> Engine:
    """Check this machine, then the target's files, then load its engines.

    Args:
        files: The opened bundle.
        target: The target.
        config: The model's configuration.
        machine: Where the engines run; None: on this machine.

    Raises:
        MissingDependencyError: This machine lacks a package or the GPU, or has another one than the engine needs.
        BundleError: A file is missing or differs from what was built.
        ContractError: An engine cannot be loaded or breaks the contract.
    """
    place = machine_of_profile(target.profile) if machine is None else machine
    entries: Mapping[str, str] = files.manifest["targets"][target.name]["engines"]
    missing = [graph for graph in _NEEDED if graph not in entries]
    if missing:
        raise BundleError(
            f"{files.path}: target {target.name} has no {' and no '.join(missing)} engine; build it again"
        )
    engines = {
        graph: EngineFile(
            graph=graph,
            path=files.path / name,
            sidecar=files.path / _sidecar(name),
            read_plan=partial(files.content, name),
            read_sidecar=partial(files.content, _sidecar(name)),
            contract=graph_spec(graph, config, target.cache_dtype, target.profile.capacity),
            unroll=(target.unroll or 1) if graph == "prefill" else 1,
        )
        for graph, name in entries.items()
    }
    return TensorRTEngine(place, engines, target.profile)


def _sidecar(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(".json"))
