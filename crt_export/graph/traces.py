"""Traces of the functions that graphs are made of, made in a process of its own while the caller goes on.

Tracing is single-threaded Python and depends on the architecture and the dtypes, not on the weights: the process
(``python -m`` this module) gets a configuration, traces a model of that shape whose memory is never touched, and
leaves ONNX files that name every weight and hold none. The caller puts its own in.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from crt_export import errors
from crt_export.child_process import ChildModule, answer_stream
from crt_export.config import ModelConfig
from crt_export.errors import BuildError, CrtExportError
from crt_export.folders import temporary_folder
from crt_export.graph.export import GraphExporter, weights_of_model
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_class

_MODULE = "crt_export.graph.traces"
_DELIBERATE = {cls.__name__: cls for cls in (errors.BuildError, errors.ContractError, errors.UnsupportedError)}


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """Graphs of one model function.

    Attributes:
        parts: Names of :func:`crt_export.graph.export.parts_of_graphs`.
        dtype: Of weights and caches, ``float32`` or ``float16``.
        residual_dtype: Of the residual stream.
    """

    parts: tuple[str, ...]
    dtype: str
    residual_dtype: str

    @property
    def folder(self) -> str:
        """Where its files lie, below the folder of all jobs."""
        return f"{self.dtype}-{self.residual_dtype}"


class Traces:
    """Traces that are being made. Made by :func:`start_traces`."""

    def __init__(self, child: ChildModule | None, jobs: Sequence[TraceJob], folder: Path) -> None:
        self._child, self._jobs, self._folder = child, jobs, folder
        self._finished = False

    def of(self, model: LanguageModel) -> dict[str, ir.Model]:
        """Wait for all jobs; the traces of the one for a model's dtypes, its weights put in.

        Without such a job it waits for nothing and returns nothing.

        Raises:
            BuildError: The process died, or made something else; errors of the exporter as in
                :meth:`crt_export.graph.export.GraphExporter.graph`.
        """
        for job in self._jobs:
            if _dtypes(model) == (job.dtype, job.residual_dtype):
                self._finish()
                return {part: _with_weights(self._folder / job.folder / f"{part}.onnx", model) for part in job.parts}
        return {}

    def _finish(self) -> None:
        if self._finished or self._child is None:
            return
        end = self._child.wait()
        if end.code != 0:
            raise BuildError(f"the process that traces the graphs died with {end.cause}\n{end.last_words}")
        answer = json.loads(end.answer)
        if answer:
            raise _DELIBERATE.get(answer["error"], BuildError)(answer["message"])
        self._finished = True


@contextmanager
def start_traces(config: ModelConfig, jobs: Sequence[TraceJob]) -> Iterator[Traces]:
    """Start tracing; leaving the block ends it.

    Args:
        config: The architecture.
        jobs: What to trace, of different dtypes each; without any no process is started.

    Yields:
        The traces to be.
    """
    if not jobs:
        yield Traces(None, (), Path())
        return
    with temporary_folder() as folder:
        text = {"config": config.to_dict(), "jobs": [dataclasses.asdict(job) for job in jobs], "folder": str(folder)}
        with ChildModule(_MODULE, json.dumps(text)) as child:
            yield Traces(child, jobs, folder)


def _dtypes(model: LanguageModel) -> tuple[str, str]:
    names = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, model.residual_dtype))
    return next(names), next(names)


def _with_weights(file: Path, model: LanguageModel) -> ir.Model:
    graph = ir.load(file)
    for name, tensor in weights_of_model(model).items():
        value = graph.graph.initializers.get(name)
        if value is not None:
            found = value.const_value
            weight = ir.tensor(tensor.numpy(), name=name)
            if found is None or (found.dtype, found.shape.numpy()) != (weight.dtype, weight.shape.numpy()):
                raise BuildError(f"{file.name}: weight {name} was traced as {found}, the model has {weight.shape}")
            value.const_value = weight
    return graph


def write_traces(model: LanguageModel, parts: Iterable[str], folder: Path) -> None:
    """Trace the named parts of graphs; one ONNX file each, which names weights and holds none.

    Raises:
        BuildError: The exporter failed.
    """
    folder.mkdir()
    exporter, weights = GraphExporter(model), weights_of_model(model)
    for name in parts:
        graph = exporter.part(name)
        for initializer, value in graph.graph.initializers.items():
            tensor = value.const_value
            if initializer in weights and tensor is not None:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    "weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=initializer, base_dir=folder
                )
        ir.save(graph, folder / f"{name}.onnx")


def model_without_weights(config: ModelConfig, dtype: torch.dtype, residual_dtype: torch.dtype) -> LanguageModel:
    """A model whose weights have shape, dtype and address, and whatever values: nothing was ever written there."""
    with torch.device("meta"):
        model = model_class(config.model_type)(config)
    model = model.to_empty(device="cpu")
    model.reset_tables()
    model.residual_dtype = residual_dtype
    return model.to(dtype).eval().requires_grad_(False)


def main() -> None:
    """Do the jobs on stdin; deliberate errors are the answer."""
    given = json.loads(sys.stdin.read())
    stream = answer_stream()
    answer: dict[str, Any] = {}
    try:
        for values in given["jobs"]:
            job = TraceJob(**{**values, "parts": tuple(values["parts"])})
            dtype, residual = getattr(torch, job.dtype), getattr(torch, job.residual_dtype)
            model = model_without_weights(ModelConfig.from_dict(given["config"]), dtype, residual)
            write_traces(model, job.parts, Path(given["folder"]) / job.folder)
    except CrtExportError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    with stream:
        stream.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
