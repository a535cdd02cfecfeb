"""What a session needs of ONNX Runtime: the graphs of a target, and memory where they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from crt_export.bundle import HeldGraph
from crt_export.engine.base import Buffer
from crt_export.engine.ort import OrtGraph, OrtSettings, import_onnxruntime, load_with_settings
from crt_export.engine.ort_memory import DeviceBuffer, HostBuffer
from crt_export.errors import UnsupportedError
from crt_export.exclusive import Exclusive


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
