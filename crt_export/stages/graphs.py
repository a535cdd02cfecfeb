"""Stage: export, quantise, rewrite and write the graphs that the targets have, each weight once per precision.

Two exports per graph (fp32, fp16); w8 and w8a8 are passes over them. What ONNX Runtime runs is shared by all targets of
a precision; step, prefill and prefill_pass of a target that TensorRT compiles are rewritten for that target. A graph
that no target has is held in memory only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import BuildError
from crt_export.graph.contract import check_contract
from crt_export.graph.export import GraphExporter, parts_of_graphs
from crt_export.graph.passes.decompose_attention import attention_of_profile, decompose_attention
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.graph.passes.separate_rotation import separate_rotation
from crt_export.graph.traces import TraceJob, Traces, start_traces
from crt_export.graph.weights import SharedArrays, save_graph, write_graph, write_weights
from crt_export.models.registry import model_from_checkpoint, with_positions
from crt_export.profile import EngineProfile, cache_dtype
from crt_export.progress import Progress
from crt_export.quantize.linears import expected_matmuls
from crt_export.quantize.plan import PLAN_FILE, QuantizedLinears, W8A8Plan, quantize_linears
from crt_export.quantize.w8 import quantize_w8
from crt_export.quantize.w8a8 import quantize_w8a8
from crt_export.spec import graph_names, graph_spec
from crt_export.stages.store import NO_STORE, StageStore, stage_key

GRAPHS_FOLDER = "graphs"
_STAGE = "graphs"
#: Exported precision -> the precision that a pass makes of it, and the dtype it is exported in.
_DERIVED = {"fp32": ("w8", torch.float32), "fp16": ("w8a8", torch.float16)}


@dataclass(frozen=True, order=True)
class GraphVariant:
    """Which graph: the same model function in one precision, with its passes and residual stream chosen.

    Attributes:
        target: The target that it is rewritten for; empty where it is shared.
        capacity: Cache length that it is fixed to; 0 where that is open.
        attention: ``fused`` or ``decomposed``.
    """

    graph: str
    precision: str
    unroll: int
    residual_dtype: str
    target: str = ""
    capacity: int = 0
    attention: str = "fused"

    def shared(self, precision: str) -> GraphVariant:
        """What it is rewritten from, in this precision or another one."""
        return GraphVariant(self.graph, precision, self.unroll, self.residual_dtype)

    @property
    def cache_dtype(self) -> str:
        """The dtype of its caches."""
        return cache_dtype(self.precision)

    def filename(self, config: ModelConfig) -> str:
        """``prefill.fp32.onnx``; what differs from the checkpoint's and precision's default is spelled out."""
        if self.target:
            return f"{self.graph}.{self.target}.onnx"
        passes = "" if self.graph != "prefill" or self.unroll == _default_unroll(config) else f"-k{self.unroll}"
        half = self.precision in ("fp16", "w8a8")
        residual = "-residual32" if half and self.residual_dtype == "float32" else ""
        return f"{self.graph}{passes}{residual}.{self.precision}.onnx"


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A written graph.

    Attributes:
        variant: What it is.
        file: Its path in the bundle, as is ``weights``.
        sha256: Of the file, lower-case hex; ``weights_sha256`` likewise.
        quantized_matmuls: MatMuls whose weight is INT8.
    """

    variant: GraphVariant
    file: str
    sha256: str
    weights: str
    weights_sha256: str
    quantized_matmuls: int

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of its two files by name, as they were hashed while they were written."""
        return {self.file: self.sha256, self.weights: self.weights_sha256}


def variants_of_profile(profile: EngineProfile, config: ModelConfig) -> dict[str, GraphVariant]:
    """The graphs one target is made of, by name.

    Raises:
        UnsupportedError: The profile insists on fused attention, and there is no kernel.
    """
    unroll, attention = profile.unroll or 1, attention_of_profile(profile, config.carried)
    shared = {
        name: GraphVariant(name, profile.precision, unroll if name == "prefill" else 1, profile.residual_dtype)
        for name in graph_names(config.carried)
    }
    if not profile.compiled:
        return shared
    own = {"target": profile.name, "capacity": profile.capacity, "attention": attention}
    return {name: variant if name == "head" else replace(variant, **own) for name, variant in shared.items()}


def _graph_file(values: Mapping[str, Any]) -> GraphFile:
    """What was stored of one."""
    return GraphFile(**{**values, "variant": GraphVariant(**values["variant"])})


def _default_unroll(config: ModelConfig) -> int:
    return config.carried.passes


def write_graphs(
    checkpoint: Checkpoint,
    profiles: Sequence[EngineProfile],
    plan: W8A8Plan | None,
    folder: Path,
    progress: Progress,
    store: StageStore = NO_STORE,
) -> dict[GraphVariant, GraphFile]:
    """Write every graph that a target has into ``folder/graphs``, and keep the plan of w8a8 beside them.

    Rotary tables have as many rows as the largest capacity: nobody can ask for a position beyond it.

    Args:
        checkpoint: The model.
        profiles: Resolved targets.
        plan: Quantisation of w8a8; needed when a target has that precision.
        folder: Staging folder of the bundle.
        progress: Told which graph is being exported.
        store: Where graphs of the same model may lie.

    Raises:
        UnsupportedError: A weight does not fit into the precision, or a profile insists on fused attention where
            there is no kernel.
        BuildError: The exporter failed, or a quantisation pass missed a MatMul.
    """
    (folder / GRAPHS_FOLDER).mkdir()
    if plan is not None:
        (folder / PLAN_FILE).write_bytes(plan.to_bytes())
    config = checkpoint.config
    wanted = {variant for profile in profiles for variant in variants_of_profile(profile, config).values()}
    positions = max(profile.capacity for profile in profiles)
    shortened = with_positions(checkpoint, positions)
    cut = shortened.config
    writer = _Writer(shortened, plan, folder, store, progress)
    written: dict[GraphVariant, GraphFile] = {}
    missing: list[GraphVariant] = []
    for precision in (name for exported, (derived, _) in _DERIVED.items() for name in (exported, derived)):
        variants = sorted(variant for variant in wanted if variant.precision == precision)
        found = writer.stored(variants) if variants else {}
        written |= found
        missing += [] if found else variants
    with start_traces(cut, _trace_jobs(missing, cut)) as traces:
        for exported in _DERIVED:
            written |= _made(writer, exported, missing, traces)
    return written


def _made(
    writer: _Writer, exported: str, missing: Sequence[GraphVariant], traces: Traces
) -> dict[GraphVariant, GraphFile]:
    """Export one precision, write what is missing of it, and likewise of what a pass makes of it."""
    derived, dtype = _DERIVED[exported]
    variants = {name: [variant for variant in missing if variant.precision == name] for name in (exported, derived)}
    wanted = sorted({variant.shared(exported) for same in variants.values() for variant in same})
    graphs = _export(writer.checkpoint, wanted, dtype, writer.progress, traces)
    written: dict[GraphVariant, GraphFile] = {}
    for precision, same in variants.items():
        if same:
            of_precision = {variant.shared(precision): graphs[variant.shared(exported)] for variant in same}
            written |= writer.write(same, of_precision)
    return written


def _trace_jobs(missing: Iterable[GraphVariant], config: ModelConfig) -> list[TraceJob]:
    """What is traced in another process: every model function but the first, which this one traces meanwhile."""
    graphs: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for exported, (derived, dtype) in _DERIVED.items():
        for variant in sorted(missing):
            if variant.precision in (exported, derived):
                key = (str(dtype).removeprefix("torch."), variant.residual_dtype)
                graphs.setdefault(key, set()).add((variant.graph, variant.unroll))
    return [
        TraceJob(parts=parts_of_graphs(config.carried, sorted(found)), dtype=dtype, residual_dtype=residual_dtype)
        for (dtype, residual_dtype), found in [*graphs.items()][1:]
    ]


class _Writer:
    """Writes the graphs of one precision after the other, or takes them from the store."""

    def __init__(
        self, checkpoint: Checkpoint, plan: W8A8Plan | None, folder: Path, store: StageStore, progress: Progress
    ) -> None:
        self.checkpoint, self._plan, self._folder = checkpoint, plan, folder
        self._store, self.progress = store, progress

    def stored(self, variants: Sequence[GraphVariant]) -> dict[GraphVariant, GraphFile]:
        """The graphs of one precision, if the same ones were made before; else nothing."""
        files = self._store.restore_as(
            _STAGE, self._key(variants), self._folder, lambda answer: [*map(_graph_file, answer["graphs"])]
        )
        if files is None:
            return {}
        self.progress(f"graphs {variants[0].precision}: as stored by an earlier build", 0, 0)
        return {file.variant: file for file in files}

    def write(
        self, variants: Sequence[GraphVariant], shared: Mapping[GraphVariant, ir.Model]
    ) -> dict[GraphVariant, GraphFile]:
        """Quantise the shared graphs in place, where a pass makes their precision; rewrite, write and store."""
        config, precision = self.checkpoint.config, variants[0].precision
        counts, made, quantized = dict.fromkeys(shared, 0), SharedArrays(), None
        if precision == "w8a8" and self._plan is not None:
            quantized = quantize_linears(model_from_checkpoint(self.checkpoint), self._plan)
        for done, variant in enumerate(shared if precision not in _DERIVED else []):
            self.progress(f"quantise {precision}", done, len(shared))
            counts[variant] = _quantize(variant, shared[variant], quantized, config, made)
        self.progress(f"write {precision}", 0, 0)
        graphs = {variant: _rewritten(shared[variant.shared(precision)], variant, config) for variant in variants}
        written = _write(graphs, counts, config, self._folder)
        digests = {name: digest for file in written for name, digest in file.digests.items()}
        answer = {"graphs": [*map(dataclasses.asdict, written)]}
        self._store.keep(_STAGE, self._key(variants), self._folder, sorted(digests), answer, digests)
        return {file.variant: file for file in written}

    def _key(self, variants: Sequence[GraphVariant]) -> str:
        if self._store.folder is None:
            return ""
        plan = self._plan if variants[0].precision == "w8a8" else None
        return stage_key(
            _STAGE,
            {
                "checkpoint": self.checkpoint.sha256,
                "positions": self.checkpoint.config.max_position_embeddings,
                "plan": None if plan is None else plan.sha256,
                "variants": [dataclasses.asdict(variant) for variant in variants],
            },
        )


def _export(
    checkpoint: Checkpoint, variants: Sequence[GraphVariant], dtype: torch.dtype, progress: Progress, traces: Traces
) -> dict[GraphVariant, ir.Model]:
    graphs: dict[GraphVariant, ir.Model] = {}
    for residual_dtype in sorted({variant.residual_dtype for variant in variants}):
        progress(f"export {variants[0].precision}", len(graphs), len(variants))
        model = model_from_checkpoint(checkpoint, dtype, getattr(torch, residual_dtype))
        exporter = GraphExporter(model, traces.of(model))
        for variant in (variant for variant in variants if variant.residual_dtype == residual_dtype):
            progress(f"export {variant.precision}", len(graphs), len(variants))
            graphs[variant] = exporter.graph(variant.graph, unroll=variant.unroll)
            progress(f"export {variant.precision}", len(graphs), len(variants))
    return graphs


def _quantize(
    variant: GraphVariant,
    graph: ir.Model,
    quantized: QuantizedLinears | None,
    config: ModelConfig,
    made: SharedArrays,
) -> int:
    if variant.precision == "w8":
        count = quantize_w8(graph, made)
    elif quantized is not None:
        count = quantize_w8a8(graph, quantized)
    else:
        raise BuildError(f"graph {variant.graph}: precision {variant.precision} needs a quantisation plan")
    expected = expected_matmuls(config, variant.graph, variant.unroll)
    if count != expected:
        raise BuildError(
            f"graph {variant.graph} {variant.precision}: {count} MatMuls quantised, the model has {expected}"
        )
    return count


def _rewritten(graph: ir.Model, variant: GraphVariant, config: ModelConfig) -> ir.Model:
    """The graph as a target compiles it; a shared one as it is."""
    if not variant.target:
        return graph
    own = graph.clone()
    fix_capacity(own, variant.capacity)
    separate_rotation(own)
    if variant.attention == "decomposed":
        decompose_attention(own)
    check_contract(own, graph_spec(variant.graph, config, variant.cache_dtype, variant.capacity))
    return own


def decomposed_file(file: GraphFile, config: ModelConfig, folder: Path) -> GraphFile:
    """Rewrite a written graph of a target for the want of a fused kernel, in its place."""
    graph = ir.load(folder / file.file)
    decompose_attention(graph)
    variant = replace(file.variant, attention="decomposed")
    check_contract(graph, graph_spec(variant.graph, config, variant.cache_dtype, variant.capacity))
    return replace(file, variant=variant, sha256=save_graph(graph, folder / file.file))


def _write(
    graphs: Mapping[GraphVariant, ir.Model], counts: Mapping[GraphVariant, int], config: ModelConfig, folder: Path
) -> list[GraphFile]:
    precision = next(iter(graphs)).precision
    names = {variant: variant.filename(config) for variant in graphs}
    by_name = {names[variant]: graph for variant, graph in graphs.items()}
    weights = write_weights(by_name, folder / GRAPHS_FOLDER / f"{precision}.weights")
    return [
        GraphFile(
            variant=variant,
            file=f"{GRAPHS_FOLDER}/{names[variant]}",
            sha256=write_graph(graph, folder / GRAPHS_FOLDER / names[variant], weights),
            weights=f"{GRAPHS_FOLDER}/{weights.path.name}",
            weights_sha256=weights.sha256,
            quantized_matmuls=counts[variant.shared(precision)],
        )
        for variant, graph in graphs.items()
    ]
