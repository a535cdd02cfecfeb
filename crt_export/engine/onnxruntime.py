"""ONNX Runtime on a CPU or a CUDA GPU: loads the graphs of a target, binds tensors by address, runs them.

``fork`` copies no threads, and ONNX Runtime waits for its threads when a session ends. A child that only ends would
therefore wait for ever for the threads of its parent's sessions; so it keeps them until the system takes them back.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from crt_export.bundle import HeldGraph
from crt_export.engine.base import Buffer, BufferSlice
from crt_export.engine.ort import OrtSettings, import_onnxruntime, open_session
from crt_export.errors import ContractError, UnsupportedError, problem_list
from crt_export.exclusive import Exclusive
from crt_export.profile_options import OrtOptions
from crt_export.spec import TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


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
        _OPEN.add(self)

    def left_behind(self) -> None:
        """In a forked child: its threads, if it has any besides the caller's, stayed in the parent."""
        # Never released, not even when the interpreter ends and clears every module.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
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
        self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
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


_OPEN: WeakSet[OrtGraph] = WeakSet()


def _in_child() -> None:
    for graph in list(_OPEN):
        graph.left_behind()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_in_child)


def load_graph(path: str | Path, *, threads: int = 0, device: str = "cpu") -> OrtGraph:
    """Load one ONNX file, to be run on host arrays.

    Args:
        path: The file; external data is read from its folder.
        threads: CPU threads, 0 for every core.
        device: ``cpu`` or ``cuda``.

    Raises:
        MissingDependencyError: ONNX Runtime or its GPU build is not installed, or installed twice.
        ContractError: The file is missing or ONNX Runtime refuses it.
    """
    options = OrtOptions(huge_pages=False)
    settings = OrtSettings(device=device, threads=threads, options=options)
    return load_with_settings(import_onnxruntime(device), Path(path), settings, stop_spinning=True)


def load_with_settings(
    library: Any, graph: Path | HeldGraph, settings: OrtSettings, *, stop_spinning: bool
) -> OrtGraph:
    """Load one ONNX file; arguments and errors are those of :func:`open_session`."""
    session = open_session(library, graph, settings, stop_spinning=stop_spinning)
    path = graph if isinstance(graph, Path) else graph.path
    return OrtGraph(path, session, settings.device, threads=settings.threads)


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


def _spec_from_ort(path: Path, node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise ContractError(
            f"{path.name}: {node.name} is {node.type}; the contract knows {', '.join(_DTYPES.values())}"
        )
    # An unnamed dynamic dim gets a name of its own, so that no check takes two of them for the same size.
    dims = tuple(f"{node.name}.{axis}" if dim is None else dim for axis, dim in enumerate(node.shape))
    return TensorSpec(name=node.name, dtype=_DTYPES[node.type], dims=dims)


class OrtEngine:
    """The graphs of one target on ONNX Runtime; see :class:`crt_export.engine.base.Engine`.

    On a CPU one graph makes steps and prefill alike (``one_graph``), so its weights are packed in memory once. A pass
    over one token is the equation of a step, and takes as long: on two cores, D=5, C=1120, 5.56 ms against 5.80 with
    INT8 weights, 18.8 against 18.8 in FP32.

    Threads: every loaded graph owns ``threads - 1`` of them (the thread that calls is one more), however many
    sessions run it, and from however many threads. The graphs of an engine run in turns, so only the step's threads
    spin on between calls; those of another graph sleep as soon as a call ends. ONNX Runtime could run all graphs of a
    process on one pool (``set_global_thread_pool_sizes`` with ``use_per_session_threads = False``), which was tried
    with 1.31.1: a step takes as long either way, but the size of that pool is set once per process, for good and for
    everybody in it, without a choice about spinning. That is the application's to decide, not a library's.
    """

    max_batch: int | None = None
    fixed_capacity: int | None = None

    def __init__(
        self,
        graphs: Mapping[str, Path | HeldGraph],
        settings: OrtSettings,
        *,
        max_tokens: int,
        one_graph: str | None = None,
        on_demand: Mapping[str, Callable[[], Path | HeldGraph]] | None = None,
        check: Callable[[str, OrtGraph], None] | None = None,
    ) -> None:
        """Load every graph but those on demand.

        Args:
            graphs: Graph name to ONNX file, or graph of a bundle.
            settings: How to load them.
            max_tokens: Longest chunk of one prefill call.
            one_graph: The one of ``graphs`` that makes steps as well; None where there is a ``step``.
            on_demand: Graphs that are loaded on first use: name to a call that checks and gives it.
            check: Called with every graph loaded on demand, before it is used; raises what is wrong with it.

        Raises:
            MissingDependencyError: ONNX Runtime or its GPU build is not installed, or installed twice.
            ContractError: A file cannot be loaded.
        """
        self.max_tokens = max_tokens
        self.one_graph = one_graph is not None
        self._step = one_graph or "step"
        self._settings = settings
        self._library = import_onnxruntime(settings.device)
        self._on_demand = dict(on_demand or {})
        self._check = check
        self._exclusive = Exclusive("this engine")
        self._graphs = {
            # Two spinning pools in one thread double the time of a step.
            name: load_with_settings(self._library, graph, settings, stop_spinning=name != self._step)
            for name, graph in graphs.items()
        }

    def program(self, graph: str) -> OrtGraph:
        """The loaded graph of this name.

        Raises:
            UnsupportedError: The target has no such graph.
            ContractError: A graph on demand cannot be loaded; ``check`` may raise others.
        """
        graph = self._step if graph == "step" else graph
        loaded = self._graphs.get(graph)
        if loaded is not None:
            return loaded
        return self._exclusive.wait(self._demanded, graph)

    @property
    def host_memory(self) -> bool:
        """Whether it computes in host memory."""
        return self._settings.device == "cpu"

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """New zeroed memory where this engine computes."""
        if self._settings.device == "cuda":
            return DeviceBuffer(self._library, self._settings.device, shape, dtype)
        return HostBuffer(shape, dtype)

    def close(self) -> None:
        """Release the graphs."""
        self._graphs = {}
        self._on_demand = {}

    def _demanded(self, graph: str) -> OrtGraph:
        if graph not in self._graphs:  # another thread may have asked for it too
            self._graphs[graph] = self._load_on_demand(graph)
        return self._graphs[graph]

    def _load_on_demand(self, graph: str) -> OrtGraph:
        if graph not in self._on_demand:
            known = ", ".join((*self._graphs, *self._on_demand)) or "none: it is closed"
            raise UnsupportedError(f"this target has no {graph} graph, only {known}")
        loaded = load_with_settings(self._library, self._on_demand[graph](), self._settings, stop_spinning=True)
        if self._check is not None:
            self._check(graph, loaded)
        return loaded


class HostBuffer:
    """A numpy array that ONNX Runtime reads and writes directly."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        """Allocate zeros."""
        self._array = np.zeros(shape, np.dtype(dtype))
        self.shape = shape
        self.dtype = self._array.dtype
        self.address = self._array.ctypes.data

    def read(self) -> np.ndarray:
        """The array itself, not a copy."""
        return self._array

    def write(self, values: np.ndarray) -> None:
        """Replace the whole content."""
        self._array[...] = values

    def copy_rows(self, source: Buffer, rows: slice) -> None:
        """Take these rows from another buffer."""
        self._array[rows] = source.read()[rows]

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the cache entries of some tokens of one row."""
        self._array[row, :, begin:end] = 0


class DeviceBuffer:
    """Memory of a device (``cuda``; ``cpu`` works too), owned by an OrtValue.

    ONNX Runtime copies whole values only, so changing part of one goes through the host: that happens after a
    padded prefill, a failure or a reset, never in a step over all rows.
    """

    def __init__(self, library: Any, device: str, shape: tuple[int, ...], dtype: str) -> None:
        """Allocate zeros."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._value = library.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype), device, 0)
        self.address = int(self._value.data_ptr())

    def read(self) -> np.ndarray:
        """A host copy."""
        return self._value.numpy()

    def write(self, values: np.ndarray) -> None:
        """Replace the whole content, at the same address."""
        self._value.update_inplace(np.ascontiguousarray(values, self.dtype))

    def copy_rows(self, source: Buffer, rows: slice) -> None:
        """Take these rows from another buffer."""
        values = self.read()
        values[rows] = source.read()[rows]
        self.write(values)

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero the cache entries of some tokens of one row."""
        values = self.read()
        values[row, :, begin:end] = 0
        self.write(values)
