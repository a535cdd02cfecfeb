"""Stage: export, quantise and write the graphs that the targets need, each precision once.

Two exports per graph (fp32, fp16); w8 and w8a8 are passes over them. Nothing here depends on a target but what its
profile says about precision, unroll and residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import BuildError
from crt_export.graph import GraphExporter, write_graph, write_weights
from crt_export.model import model_from_checkpoint
from crt_export.profile import EngineProfile
from crt_export.progress import Progress
from crt_export.quantize import W8A8Plan, expected_matmuls, quantize_w8, quantize_w8a8
from crt_export.spec import graph_names

GRAPHS_FOLDER = "graphs"
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


def forms_of_profile(profile: EngineProfile, config: ModelConfig) -> dict[str, GraphForm]:
    """The graphs one target is made of, by name."""
    unroll = profile.unroll or 1
    return {
        name: GraphForm(name, profile.precision, unroll if name == "prefill" else 1, profile.residual_dtype)
        for name in graph_names(config)
    }


def write_graphs(
    checkpoint: Checkpoint, profiles: Sequence[EngineProfile], plan: W8A8Plan | None, folder: Path, progress: Progress
) -> dict[GraphForm, GraphFile]:
    """Export every graph the targets need into ``folder/graphs``.

    Args:
        checkpoint: The model.
        profiles: Resolved targets.
        plan: Quantisation of w8a8; needed when a target has that precision.
        folder: Staging folder of the bundle.
        progress: Told which graph is being exported.

    Raises:
        UnsupportedError: A weight does not fit into the precision.
        BuildError: The exporter failed, or a quantisation pass missed a MatMul.
    """
    (folder / GRAPHS_FOLDER).mkdir()
    wanted = {form for profile in profiles for form in forms_of_profile(profile, checkpoint.config).values()}
    written: dict[GraphForm, GraphFile] = {}
    for exported, (derived, dtype) in _DERIVED.items():
        forms = sorted({_as(form, exported) for form in wanted if form.precision in (exported, derived)})
        graphs = _export(checkpoint, forms, dtype, progress)
        if any(form.precision == exported for form in wanted):
            written |= _write(graphs, {}, checkpoint.config, folder)
        if any(form.precision == derived for form in wanted):
            graphs = {_as(form, derived): graph for form, graph in graphs.items()}
            counts = {form: _quantize(form, graph, plan, checkpoint.config) for form, graph in graphs.items()}
            written |= _write(graphs, counts, checkpoint.config, folder)
    return written


def _as(form: GraphForm, precision: str) -> GraphForm:
    return GraphForm(form.graph, precision, form.unroll, form.residual_dtype)


def _default_unroll(config: ModelConfig) -> int:
    return config.unroll_steps if config.recurrent else 1


def _export(
    checkpoint: Checkpoint, forms: Sequence[GraphForm], dtype: torch.dtype, progress: Progress
) -> dict[GraphForm, ir.Model]:
    graphs: dict[GraphForm, ir.Model] = {}
    for residual_dtype in sorted({form.residual_dtype for form in forms}):
        exporter = GraphExporter(model_from_checkpoint(checkpoint, dtype, getattr(torch, residual_dtype)))
        for form in (form for form in forms if form.residual_dtype == residual_dtype):
            progress(f"export {form.precision}", len(graphs), len(forms))
            graphs[form] = exporter.graph(form.graph, unroll=form.unroll)
            progress(f"export {form.precision}", len(graphs), len(forms))
    return graphs


def _quantize(form: GraphForm, graph: ir.Model, plan: W8A8Plan | None, config: ModelConfig) -> int:
    if form.precision == "w8":
        count = quantize_w8(graph)
    elif plan is not None:
        count = quantize_w8a8(graph, plan)
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
