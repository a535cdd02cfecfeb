"""Stage: export, quantise and write the graphs that the targets need, each precision once.

Two exports per graph (fp32, fp16); w8 and w8a8 are passes over them. Nothing here depends on a target but what its
profile says about precision, unroll and residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from crt_export.build.keys import stage_key
from crt_export.build.store import NO_STORE, StageStore
from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import BuildError
from crt_export.graph import GraphExporter, parts_of_graphs, write_graph, write_weights
from crt_export.graph.traces import TraceJob, Traces, start_traces
from crt_export.memo import Memo
from crt_export.model import model_from_checkpoint
from crt_export.profile import EngineProfile
from crt_export.progress import Progress
from crt_export.quantize import (
    PLAN_FILE,
    QuantizedLinears,
    W8A8Plan,
    expected_matmuls,
    quantize_linears,
    quantize_w8,
    quantize_w8a8,
)
from crt_export.spec import graph_names

GRAPHS_FOLDER = "graphs"
_STAGE = "graphs"
#: Exported precision -> the precision that a pass makes of it, and the dtype it is exported in.
_DERIVED = {"fp32": ("w8", torch.float32), "fp16": ("w8a8", torch.float16)}


@dataclass(frozen=True, order=True)
class GraphForm:
    """Which graph: the same model function in one precision, with its passes and residual stream chosen."""

    graph: str
    precision: str
    unroll: int
    residual_dtype: str

    def filename(self, config: ModelConfig) -> str:
        """``prefill.fp32.onnx``; what differs from the checkpoint's and precision's default is spelled out."""
        passes = "" if self.graph != "prefill" or self.unroll == _default_unroll(config) else f"-k{self.unroll}"
        half = self.precision in ("fp16", "w8a8")
        residual = "-residual32" if half and self.residual_dtype == "float32" else ""
        return f"{self.graph}{passes}{residual}.{self.precision}.onnx"


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A written graph.

    Attributes:
        form: What it is.
        file: Its path in the bundle, as is ``weights``.
        quantized_matmuls: MatMuls whose weight is INT8.
    """

    form: GraphForm
    file: str
    weights: str
    quantized_matmuls: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraphFile:
        """Read what to_dict wrote."""
        return cls(**{**values, "form": GraphForm(**values["form"])})


def forms_of_profile(profile: EngineProfile, config: ModelConfig) -> dict[str, GraphForm]:
    """The graphs one target is made of, by name."""
    unroll = profile.unroll or 1
    return {
        name: GraphForm(name, profile.precision, unroll if name == "prefill" else 1, profile.residual_dtype)
        for name in graph_names(config)
    }


def write_graphs(
    checkpoint: Checkpoint,
    profiles: Sequence[EngineProfile],
    plan: W8A8Plan | None,
    folder: Path,
    progress: Progress,
    store: StageStore = NO_STORE,
) -> dict[GraphForm, GraphFile]:
    """Export every graph the targets need into ``folder/graphs``, and keep the plan of w8a8 beside them.

    Args:
        checkpoint: The model.
        profiles: Resolved targets.
        plan: Quantisation of w8a8; needed when a target has that precision.
        folder: Staging folder of the bundle.
        progress: Told which graph is being exported.
        store: Where graphs of the same model may lie.

    Raises:
        UnsupportedError: A weight does not fit into the precision.
        BuildError: The exporter failed, or a quantisation pass missed a MatMul.
    """
    (folder / GRAPHS_FOLDER).mkdir()
    if plan is not None:
        (folder / PLAN_FILE).write_bytes(plan.to_bytes())
    wanted = {form for profile in profiles for form in forms_of_profile(profile, checkpoint.config).values()}
    writer = _Writer(checkpoint, plan, folder, store, progress)
    written: dict[GraphForm, GraphFile] = {}
    missing: list[GraphForm] = []
    for precision in (name for exported, (derived, _) in _DERIVED.items() for name in (exported, derived)):
        forms = sorted(form for form in wanted if form.precision == precision)
        found = writer.stored(forms) if forms else {}
        written |= found
        missing += [] if found else forms
    with start_traces(checkpoint.config, _trace_jobs(missing, checkpoint.config)) as traces:
        for exported in _DERIVED:
            written |= _made(writer, exported, missing, traces)
    return written


def _made(writer: _Writer, exported: str, missing: Sequence[GraphForm], traces: Traces) -> dict[GraphForm, GraphFile]:
    """Export one precision, write it where it is missing, and likewise what a pass makes of it."""
    derived, dtype = _DERIVED[exported]
    forms = {precision: [form for form in missing if form.precision == precision] for precision in (exported, derived)}
    wanted = sorted({_as(form, exported) for same in forms.values() for form in same})
    graphs = _export(writer.checkpoint, wanted, dtype, writer.progress, traces)
    written: dict[GraphForm, GraphFile] = {}
    for same in forms.values():
        if same:
            written |= writer.write({form: graphs[_as(form, exported)] for form in same})
    return written


def _trace_jobs(missing: Iterable[GraphForm], config: ModelConfig) -> list[TraceJob]:
    """What is traced in another process: every model function but the first, which this one traces meanwhile."""
    graphs: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for exported, (derived, dtype) in _DERIVED.items():
        for form in sorted(missing):
            if form.precision in (exported, derived):
                key = (str(dtype).removeprefix("torch."), form.residual_dtype)
                graphs.setdefault(key, set()).add((form.graph, form.unroll))
    return [
        TraceJob(parts=parts_of_graphs(config, sorted(found)), dtype=dtype, residual_dtype=residual_dtype)
        for (dtype, residual_dtype), found in [*graphs.items()][1:]
    ]


class _Writer:
    """Writes the graphs of one precision after the other, or takes them from the store."""

    def __init__(
        self, checkpoint: Checkpoint, plan: W8A8Plan | None, folder: Path, store: StageStore, progress: Progress
    ) -> None:
        self.checkpoint, self._plan, self._folder = checkpoint, plan, folder
        self._store, self.progress = store, progress

    def stored(self, forms: Sequence[GraphForm]) -> dict[GraphForm, GraphFile]:
        """The graphs of one precision, if the same ones were made before; else nothing."""
        files = self._store.restore_as(
            _STAGE, self._key(forms), self._folder, lambda answer: [*map(GraphFile.from_dict, answer["graphs"])]
        )
        if files is None:
            return {}
        self.progress(f"graphs {forms[0].precision}: as stored by an earlier build", 0, 0)
        return {file.form: file for file in files}

    def write(self, graphs: dict[GraphForm, ir.Model]) -> dict[GraphForm, GraphFile]:
        """Quantise where the precision is made by a pass, in place, write all, and store them."""
        forms, config = sorted(graphs), self.checkpoint.config
        precision = _only(form.precision for form in forms)
        counts, memo = dict[GraphForm, int](), Memo()
        quantized = None
        if precision == "w8a8" and self._plan is not None:
            quantized = quantize_linears(model_from_checkpoint(self.checkpoint), self._plan)
        for done, form in enumerate(forms if precision not in _DERIVED else []):
            self.progress(f"quantise {precision}", done, len(forms))
            counts[form] = _quantize(form, graphs[form], quantized, config, memo)
        self.progress(f"write {precision}", 0, 0)
        written = _write(graphs, counts, config, self._folder)
        names = sorted({name for file in written.values() for name in (file.file, file.weights)})
        answer = {"graphs": [written[form].to_dict() for form in forms]}
        self._store.keep(_STAGE, self._key(forms), self._folder, names, answer)
        return written

    def _key(self, forms: Sequence[GraphForm]) -> str:
        if self._store.folder is None:
            return ""
        plan = self._plan if any(form.precision == "w8a8" for form in forms) else None
        return stage_key(
            _STAGE,
            {
                "checkpoint": self.checkpoint.sha256,
                "plan": None if plan is None else plan.sha256,
                "forms": [dataclasses.asdict(form) for form in forms],
            },
        )


def _as(form: GraphForm, precision: str) -> GraphForm:
    return GraphForm(form.graph, precision, form.unroll, form.residual_dtype)


def _default_unroll(config: ModelConfig) -> int:
    return config.unroll_steps if config.recurrent else 1


def _export(
    checkpoint: Checkpoint, forms: Sequence[GraphForm], dtype: torch.dtype, progress: Progress, traces: Traces
) -> dict[GraphForm, ir.Model]:
    graphs: dict[GraphForm, ir.Model] = {}
    for residual_dtype in sorted({form.residual_dtype for form in forms}):
        progress(f"export {forms[0].precision}", len(graphs), len(forms))
        model = model_from_checkpoint(checkpoint, dtype, getattr(torch, residual_dtype))
        exporter = GraphExporter(model, traces.of(model))
        for form in (form for form in forms if form.residual_dtype == residual_dtype):
            progress(f"export {form.precision}", len(graphs), len(forms))
            graphs[form] = exporter.graph(form.graph, unroll=form.unroll)
            progress(f"export {form.precision}", len(graphs), len(forms))
    return graphs


def _quantize(
    form: GraphForm, graph: ir.Model, quantized: QuantizedLinears | None, config: ModelConfig, memo: Memo
) -> int:
    if form.precision == "w8":
        count = quantize_w8(graph, memo)
    elif quantized is not None:
        count = quantize_w8a8(graph, quantized)
    else:
        raise BuildError(f"graph {form.graph}: precision {form.precision} needs a quantisation plan")
    expected = expected_matmuls(config, form.graph, form.unroll)
    if count != expected:
        raise BuildError(f"graph {form.graph} {form.precision}: {count} MatMuls quantised, the model has {expected}")
    return count


def _write(
    graphs: dict[GraphForm, ir.Model], counts: dict[GraphForm, int], config: ModelConfig, folder: Path
) -> dict[GraphForm, GraphFile]:
    precision = _only(form.precision for form in graphs)
    target = folder / GRAPHS_FOLDER
    names = {form: form.filename(config) for form in graphs}
    weights = write_weights({names[form]: graph for form, graph in graphs.items()}, target / f"{precision}.weights")
    for form, graph in graphs.items():
        write_graph(graph, target / names[form], weights)
    return {
        form: GraphFile(
            form=form,
            file=f"{GRAPHS_FOLDER}/{names[form]}",
            weights=f"{GRAPHS_FOLDER}/{weights.path.name}",
            quantized_matmuls=counts.get(form, 0),
        )
        for form in graphs
    }


def _only(values: Iterable[str]) -> str:
    (value,) = set(values)
    return value
