"""Runner: the deployed engine and decoder of one target, with a tap on every call that the engine makes.

Every level decodes, prefills and goes on from a handover here, so what it measures is what an application gets: the
files are opened as a session opens them (:func:`crt_export.runtime.opening.engine_from_target`), with the profile's
options, and tokens go through :class:`crt_export.runtime.decoder.Decoder` with its batching rule, caches and passes.

A target of a GPU has no engine on the CPU that evidence runs on. Its decoder then runs over ONNX Runtime, which loads
the ONNX files that are deployed or that its engines were compiled from, with the capacity fixed as there, rows padded
as there, and FP16 multiplied in FP32 (``fp32-emulated``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crt_export.bundle import BundleFiles, HeldGraph
from crt_export.config import ModelConfig
from crt_export.engine.base import Engine
from crt_export.engine.onnxruntime import OrtEngine, OrtGraph, OrtSettings
from crt_export.errors import BundleError, ContractError, CrtExportError, UnsupportedError
from crt_export.parity.decoding import Decoding
from crt_export.profile import EngineProfile
from crt_export.profile_options import OrtOptions
from crt_export.runtime.opening import (
    DEMANDED_GRAPHS,
    SESSION_GRAPHS,
    Target,
    check_contract,
    engine_from_target,
    model_from_manifest,
    target_from_manifest,
)
from crt_export.runtime.slide import Window

if TYPE_CHECKING:
    from crt_export.parity.setup import ParityCase

#: With static shapes ONNX Runtime's MatMulAddFusion turns quantised MatMuls into FP32 Gemms, or cannot load the graph.
_STATIC_DISABLED = ("MatMulAddFusion",)
_PASS = "prefill_pass"
_HEAD = "head"
#: Up to so many parameters all targets of a bundle stay loaded; a larger model has one at a time.
_SMALL_PARAMETERS = 20_000_000
#: Memory that the caches of one decoding may take.
BATCH_BYTES = 512 * 2**20


class Runner:
    """The loaded graphs of one target.

    Attributes:
        target: The target, as a session reads it from the manifest.
        config: The model.
        engine: Where its decoders run.
    """

    def __init__(self, target: Target, config: ModelConfig, engine: Engine, load: Callable[[str], OrtGraph]) -> None:
        """Take an engine; :func:`open_runner` opens that of a bundle's target.

        Args:
            target: The target.
            config: The model.
            engine: Its graphs, loaded.
            load: Loads a graph that no session loads.
        """
        self.target, self.config, self.engine = target, config, engine
        self._load = load

    @property
    def one_graph(self) -> bool:
        """Whether steps and prefill are the same graph, as on a CPU; the K-fold prefill is then K passes of it."""
        return self.engine.one_graph

    @property
    def capacity(self) -> int | None:
        """The only capacity that the target runs with; None where any does."""
        return self.engine.fixed_capacity

    def graph_name(self, graph: str) -> str:
        """The graph that makes this step or prefill: ``prefill_pass`` where one graph makes all."""
        return (_PASS if self.config.carried.iterated else "prefill") if self.one_graph else graph

    def over(self, engine: Engine) -> Runner:
        """The same target on another engine that offers the same graphs."""
        other = copy.copy(self)
        other.engine = engine
        return other

    def decoding(self, rows: int, capacity: int, windows: Sequence[Window] | None = None) -> Decoding:
        """A decoder for some rows, empty.

        Args:
            rows: How many.
            capacity: Most tokens of a row; a target with a fixed capacity has that one instead.
            windows: Given where full rows slide, per cache.
        """
        return Decoding(self, rows, self.capacity or capacity, windows)

    def most_rows(self, capacity: int) -> int:
        """How many rows of that capacity keep the caches of a decoding within half a gigabyte; at least one."""
        return max(1, BATCH_BYTES // self.cache_bytes(capacity))

    def cache_bytes(self, tokens: int) -> int:
        """Memory of one row's caches with room for so many tokens."""
        sizes = self.target.sizes(self.config.info, 1, self.capacity or tokens)
        items = sum(spec.heads * spec.head_dim for spec in sizes.caches.values())
        return items * sizes.capacity * np.dtype(sizes.cache_dtype).itemsize

    def prefill_bytes(self, tokens: int) -> int:
        """Memory of one row that takes so many tokens at once: its caches, and what one layer's attention needs."""
        # Scores, and about as much again for mask and softmax.
        heads = max(cache.query_heads for cache in self.config.carried.caches)
        scores = 2 * 4 * heads * tokens * ((self.capacity or tokens) + tokens)
        return self.cache_bytes(tokens) + scores

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits of hidden states through the validation graph ``head``.

        Args:
            hidden: float32 [rows, seq, hidden].

        Returns:
            float32 [rows, seq, vocab]; each row in a call of its own where the target runs rows apart.

        Raises:
            ContractError: The graph cannot be loaded, breaks the contract or failed.
            BundleError: Its file is missing or differs from what was built.
        """
        parts = [hidden] if self.target.rows_are_independent else [hidden[row : row + 1] for row in range(len(hidden))]
        logits = [self._head.run({"hidden": np.ascontiguousarray(part)})["logits"] for part in parts]
        found = np.concatenate(logits) if len(logits) > 1 else logits[0]
        expected = (*hidden.shape[:2], self.config.vocab_size)
        if found.shape != expected or found.dtype != np.float32:
            raise ContractError(
                f"head: logits are {found.dtype} {list(found.shape)}, expected float32 {list(expected)}"
            )
        return found

    def close(self) -> None:
        """Release the graphs."""
        self.engine.close()
        self.__dict__.pop("_head", None)

    def load(self, graph: str) -> OrtGraph:
        """Load a graph of the target that no session loads, with the options of those that it does.

        Raises:
            ContractError: The target has no such graph, or it cannot be loaded or breaks the contract.
            BundleError: Its file is missing or differs from what was built.
        """
        return self._load(graph)

    @cached_property
    def _head(self) -> OrtGraph:
        return self.load(_HEAD)


def config_of_bundle(files: BundleFiles) -> ModelConfig:
    """The configuration that a bundle was built of.

    Raises:
        BundleError: It is unusable, or declares another model than the manifest does.
    """
    try:
        config = ModelConfig.from_dict(files.manifest["config"])
    except CrtExportError as error:
        raise BundleError(f"{files.path}: the manifest's config is unusable: {error}") from error
    declared = model_from_manifest(files)
    if _rounded(config.info.to_dict()) != _rounded(declared.to_dict()):
        raise BundleError(f"{files.path}: the manifest's model is not that of its config; build it again")
    return config


def _rounded(model: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a manifest; processors differ in the last bit of a frequency."""
    rotaries = [{**one, "frequencies": [f"{value:.12g}" for value in one["frequencies"]]} for one in model["rotaries"]]
    return {**model, "rotaries": rotaries}


def open_runner(files: BundleFiles, name: str, threads: int) -> Runner:
    """Open a target of a bundle for evidence.

    Args:
        files: The opened bundle.
        name: The target.
        threads: CPU threads, 0 for every core.

    Raises:
        InputError: The bundle has no such target.
        BundleError: Its entry is unusable, or a file is missing or differs from what was built.
        ContractError: A graph cannot be loaded or breaks the contract.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    config = config_of_bundle(files)
    target = target_from_manifest(files, name, config.info)
    missing = [graph for graph in SESSION_GRAPHS if graph not in target.graphs]
    if missing:
        raise BundleError(f"{files.path}: target {name} has no {' and no '.join(missing)} graph; build it again")

    def graph_file(graph: str) -> HeldGraph:
        return files.held_graph(target.graphs[graph])

    engine = engine_from_target(files, target, config.info, threads) if target.profile.device == "cpu" else None
    return runner_of_files(target, config, graph_file, threads, engine)


def runner_of_files(
    target: Target,
    config: ModelConfig,
    graph_file: Callable[[str], Path | HeldGraph],
    threads: int,
    engine: Engine | None = None,
) -> Runner:
    """A runner of ONNX files, loaded in the place of a GPU's engine where there is no other.

    Args:
        target: The target.
        config: The model.
        graph_file: Gives the file of a graph, one of the target's.
        threads: CPU threads, 0 for every core.
        engine: The target's own engine; None loads ``step``, and the prefills when they are first asked for, since K
            passes take gigabytes.

    Raises:
        ContractError: A graph cannot be loaded or breaks the contract.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    settings = _settings(target, threads)

    def check(graph: str, program: OrtGraph) -> None:
        check_contract({graph: program}, target, config.info)

    def load(graph: str) -> OrtGraph:
        if graph not in target.graphs:
            raise ContractError(f"target {target.name} has no {graph} graph, which validation needs")
        program = OrtEngine({graph: graph_file(graph)}, settings, max_tokens=1).program(graph)
        check(graph, program)
        return program

    if engine is None:
        later = [graph for graph in ("prefill", *DEMANDED_GRAPHS) if graph in target.graphs]
        engine = _EmulatedEngine(
            {"step": graph_file("step")},
            settings,
            max_tokens=target.profile.seq.max,
            on_demand={graph: partial(graph_file, graph) for graph in later},
            check=check,
        )
        check("step", engine.program("step"))
        engine.fixed_capacity = target.capacity if target.profile.compiled else None
    return Runner(target, config, engine, load)


class Runners:
    """The runners of a check, kept from level to level where the model is small enough to have them all open."""

    def __init__(self, config: ModelConfig, threads: int) -> None:
        """Start with none.

        Args:
            config: The model.
            threads: CPU threads, 0 for every core.
        """
        self._keeps_all = config.parameter_count <= _SMALL_PARAMETERS
        self._threads = threads
        self._open: dict[str, tuple[ParityCase, Runner]] = {}

    def of(self, case: ParityCase) -> Runner:
        """The runner of a target, opened when it is first asked for; raises as :func:`open_runner`."""
        case_and_runner = self._open.get(case.target)
        if case_and_runner is not None and case_and_runner[0].opener is case.opener:
            return case_and_runner[1]
        assert case.opener is not None, "a target is compared as the bundle holds it"
        if not self._keeps_all:
            self.close()
        runner = case.opener(self._threads)
        self._open[case.target] = (case, runner)
        return runner

    def close(self) -> None:
        """Release all of them."""
        for _, runner in self._open.values():
            runner.close()
        self._open.clear()


class _EmulatedEngine(OrtEngine):
    """ONNX Runtime in the place of a GPU's engine: what the decoder asks an engine about is answered as there."""

    host_memory = False  # type: ignore[assignment]  # pads rows and leaves no token out of a pass, as on a device

    def program(self, graph: str) -> OrtGraph:
        """The loaded graph of this name; a target without it breaks its contract."""
        try:
            return super().program(graph)
        except UnsupportedError as error:
            raise ContractError(str(error)) from error


def _settings(target: Target, threads: int) -> OrtSettings:
    """How ONNX Runtime loads a graph of the target on a CPU."""
    options = target.profile.options
    if not isinstance(options, OrtOptions):
        options = OrtOptions(disabled_optimizers=_STATIC_DISABLED, huge_pages=False)
    return OrtSettings(device="cpu", threads=threads, options=options)


def disabled_optimizers(profile: EngineProfile) -> tuple[str, ...]:
    """ONNX Runtime's rewrites that are left out where the target's files run on it."""
    return profile.options.disabled_optimizers if isinstance(profile.options, OrtOptions) else _STATIC_DISABLED
