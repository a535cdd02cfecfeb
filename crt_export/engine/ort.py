"""ONNX Runtime on a CPU or a CUDA GPU: loads a graph, binds tensors by address, runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crt_export.bundle import HeldGraph
from crt_export.engine.base import Rows
from crt_export.engine.huge_pages import allocated_in_huge_pages
from crt_export.engine.ort_loading import load_held_graph
from crt_export.engine.ort_process import import_library, survive_fork
from crt_export.environment import ORT_CONFLICT, installed_onnxruntime_wheels, onnxruntime_distributions
from crt_export.errors import (
    ContractError,
    CrtExportError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
    problem_list,
)
from crt_export.spec import TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BLOCK_BASE = "4"
_FATAL = 4  # ONNX Runtime's severity scale: errors reach the caller as exceptions, so nothing is printed as well


@dataclass(frozen=True, kw_only=True)
class OrtSettings:
    """How graphs are loaded.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of one graph; 0 takes every core.
        graph_optimization: ``disable``, ``basic``, ``extended`` or ``all``.
        disabled_optimizers: Names of single rewrites to leave out.
        spinning: Whether idle threads spin between the operators and calls of a step.
        huge_pages: Whether what a CPU's graph allocates as it is loaded, its weights, is moved into huge pages.
        mmap: Whether weights of a bundle may stay mapped from their file.

    Raises:
        InputError: A value is impossible.
    """

    device: str = "cpu"
    threads: int = 0
    graph_optimization: str = "all"
    disabled_optimizers: tuple[str, ...] = ()
    spinning: bool = True
    huge_pages: bool = False
    mmap: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        problems = []
        if self.device not in _PROVIDERS:
            problems.append(f"device must be one of {', '.join(_PROVIDERS)}, found {self.device!r}")
        if type(self.threads) is not int or self.threads < 0:
            problems.append(f"threads must be a number of at least 0 (0 takes every core), found {self.threads!r}")
        if self.graph_optimization not in _LEVELS:
            levels = ", ".join(_LEVELS)
            problems.append(f"graph_optimization must be one of {levels}, found {self.graph_optimization!r}")
        if problems:
            raise InputError(problem_list("ONNX Runtime settings", problems))


class OrtGraph:
    """One ONNX file loaded by ONNX Runtime.

    Attributes:
        path: The file.
        inputs: Name, dtype and dims of every input, in the file's order; dynamic dims are names.
        outputs: Likewise for the outputs.
    """

    def __init__(self, path: Path, session: Any, device: str, *, threads: int) -> None:
        """Wrap a loaded InferenceSession; use load_graph()."""
        self.path = path
        self.inputs = tuple(_spec_from_ort(path, node) for node in session.get_inputs())
        self.outputs = tuple(_spec_from_ort(path, node) for node in session.get_outputs())
        self._session = session
        self._device = device
        self._threads = threads
        self._lost = False
        survive_fork(self)

    @property
    def native(self) -> object:
        """The InferenceSession, which must not end in a forked child."""
        return self._session

    def left_behind(self) -> None:
        """In a forked child: its threads, if it has any besides the caller's, stayed in the parent."""
        self._lost = self._threads != 1

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on host arrays, every output by name.

        Raises:
            ContractError: An input is missing, unknown, or of another dtype or shape than the graph declares,
                or ONNX Runtime failed.
        """
        problems = array_problems(self.inputs, inputs)
        if problems:
            raise ContractError(problem_list(f"{self.path.name}: inputs", problems))
        names = [spec.name for spec in self.outputs]
        values = self._guarded(lambda: self._session.run(names, dict(inputs)))
        return dict(zip(names, values, strict=True))

    def bind(
        self, inputs: Mapping[str, Rows], outputs: Mapping[str, Rows], *, repeated: bool = False
    ) -> Callable[[], None]:
        """Fix the memory of inputs and outputs; an output at its input's address is updated in place.

        ``repeated`` changes nothing here: a bound call costs the same every time.
        """
        del repeated
        binding = self._session.io_binding()
        place = (self._device, 0)
        for name, rows in inputs.items():
            binding.bind_input(name, *place, rows.buffer.dtype.type, rows.shape, rows.address)
        for name, rows in outputs.items():
            binding.bind_output(name, *place, rows.buffer.dtype.type, rows.shape, rows.address)
        run = self._session.run_with_iobinding

        def launch() -> None:
            self._guarded(lambda: run(binding))

        return launch

    def _guarded(self, call: Callable[[], Any]) -> Any:
        if self._lost:
            raise UnsupportedError(
                f"{self.path.name} was loaded before this process was forked, and its threads stayed in the parent: "
                "open the bundle's session after the fork, or with threads=1"
            )
        try:
            return call()
        except Exception as error:  # ONNX Runtime raises RuntimeError or one of a dozen classes of its own
            raise ContractError(f"ONNX Runtime failed in {self.path.name}: {error}") from error


def load_graph(
    path: str | Path,
    *,
    threads: int = 0,
    disabled_optimizers: Sequence[str] = (),
    graph_optimization: str = "all",
    device: str = "cpu",
) -> OrtGraph:
    """Load one ONNX file, to be run on host arrays.

    Args:
        path: The file; external data is read from its folder.
        threads: CPU threads, 0 for every core.
        disabled_optimizers: Names of single graph rewrites to leave out, such as ``MatMulAddFusion``.
        graph_optimization: ``disable``, ``basic``, ``extended`` or ``all``.
        device: ``cpu`` or ``cuda``.

    Raises:
        MissingDependencyError: ONNX Runtime or its GPU build is not installed, or installed twice.
        ContractError: The file is missing or ONNX Runtime refuses it.
    """
    settings = OrtSettings(
        device=device,
        threads=threads,
        graph_optimization=graph_optimization,
        disabled_optimizers=tuple(disabled_optimizers),
    )
    return load_with_settings(import_onnxruntime(device), Path(path), settings, stop_spinning=True)


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
    if _PROVIDERS[device] not in library.get_available_providers():
        raise MissingDependencyError(
            f"the installed onnxruntime {library.__version__} has no {_PROVIDERS[device]}: "
            "pip uninstall onnxruntime, then pip install 'crt-export[cuda]'"
        )
    return library


def array_problems(specs: Sequence[TensorSpec], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What differs between declared tensors and given arrays; empty if nothing does."""
    known = {spec.name: spec for spec in specs}
    problems = [f"{name} is missing" for name in known if name not in arrays]
    problems += [f"{name} is not part of the graph" for name in arrays if name not in known]
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in known.items():
        if name in arrays:
            problems += _array_problems(spec, arrays[name], sizes)
    return problems


def _array_problems(spec: TensorSpec, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> list[str]:
    """Check one array; ``sizes`` remembers what each named dim was and in which tensor."""
    problems = []
    if array.dtype != np.dtype(spec.dtype):
        problems.append(f"{spec.name} must be {spec.dtype}, found {array.dtype}")
    if array.ndim != len(spec.dims):
        return [*problems, f"{spec.name} must have dims {list(spec.dims)}, found shape {list(array.shape)}"]
    for axis, (dim, size) in enumerate(zip(spec.dims, array.shape, strict=True)):
        if isinstance(dim, int):
            expected, where = dim, "the graph"
        else:
            expected, where = sizes.setdefault(dim, (size, spec.name))
        if size != expected:
            problems.append(f"{spec.name} has {size} on axis {axis} ({dim}), {where} has {expected}")
    return problems


def load_with_settings(
    library: Any, graph: Path | HeldGraph, settings: OrtSettings, *, stop_spinning: bool
) -> OrtGraph:
    """Load one ONNX file.

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
    provider = _PROVIDERS[settings.device]

    def load(model: str | bytes, entries: Mapping[str, str], contents: Mapping[str, Any]) -> Any:
        options = _session_options(library, settings, stop_spinning=stop_spinning)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if contents:
            names, files = list(contents), list(contents.values())
            options.add_external_initializers_from_files_in_memory(names, files, [len(file) for file in files])
        with allocated_in_huge_pages(settings.huge_pages and settings.device == "cpu"):
            return library.InferenceSession(
                model,
                sess_options=options,
                providers=[provider],
                disabled_optimizers=list(settings.disabled_optimizers) or None,
            )

    try:
        if isinstance(graph, Path):
            session = load(str(path), {}, {})
        else:
            session = load_held_graph(graph, load, keep_mapped=settings.mmap)
    except CrtExportError:
        raise
    except Exception as error:  # ONNX Runtime raises RuntimeError or one of a dozen classes of its own
        raise ContractError(f"{path}: ONNX Runtime cannot load it ({error})") from error
    if provider not in session.get_providers():
        raise MissingDependencyError(
            f"ONNX Runtime could not start {provider}: check the NVIDIA driver and the CUDA libraries of "
            "crt-export[cuda], or choose an ort-cpu target"
        )
    return OrtGraph(path, session, settings.device, threads=settings.threads)


def _session_options(library: Any, settings: OrtSettings, *, stop_spinning: bool) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(library.GraphOptimizationLevel, _LEVELS[settings.graph_optimization])
    # Threads take a loop in ever smaller pieces, so that one which is held up does not keep the others waiting.
    options.add_session_config_entry("session.dynamic_block_base", _BLOCK_BASE)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
    if stop_spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _spec_from_ort(path: Path, node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise ContractError(
            f"{path.name}: {node.name} is {node.type}; the contract knows {', '.join(_DTYPES.values())}"
        )
    # An unnamed dynamic dim gets a name of its own, so that no check takes two of them for the same size.
    dims = tuple(f"{node.name}.{axis}" if dim is None else dim for axis, dim in enumerate(node.shape))
    return TensorSpec(name=node.name, dtype=_DTYPES[node.type], dims=dims)
