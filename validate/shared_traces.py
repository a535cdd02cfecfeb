"""Traces of model functions that the tests of a run share: one for each architecture, however many models have it.

Tracing takes most of the time of an export and depends on the architecture and the dtypes, not on the weights
(``validate/unit/graph/test_traces.py``), so models that differ in weights, passes, texts or tokenizers have the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from filelock import FileLock

from crt_export.graph.export import GraphExporter
from crt_export.graph.traces import Traces
from crt_export.models.base import LanguageModel

#: What of a configuration no trace depends on.
_NO_ARCHITECTURE = ("unroll_steps", "tokenizer", "training_sequence_length", "bos_token_id", "eos_token_id")


def shared_part(folder: Path) -> Callable[[GraphExporter, str], ir.Model]:
    """What :meth:`GraphExporter.part` is replaced by: it looks into the folder first, and leaves there what it traced.

    Args:
        folder: That of the run.
    """
    trace = GraphExporter.part

    def part(self: GraphExporter, name: str) -> ir.Model:
        if name not in self._traced:
            file = folder / _key(self) / f"{name}.onnx"
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):
                if file.is_file():
                    self._traced[name] = _with_weights(file, self._model)
                else:
                    ir.save(trace(self, name), file)
        return self._traced[name]

    return part


@contextmanager
def no_traces_ahead(*_: object) -> Iterator[Traces]:
    """What a build's :func:`start_traces` is replaced by: another process would trace what may be there."""
    yield Traces(None, (), Path())


def _key(exporter: GraphExporter) -> str:
    model = exporter._model
    values = {name: value for name, value in model.config.to_dict().items() if name not in _NO_ARCHITECTURE}
    dtypes = [str(model.final_norm.weight.dtype), str(model.residual_dtype)]
    return hashlib.sha256(json.dumps([values, dtypes]).encode()).hexdigest()[:16]


def _with_weights(file: Path, model: LanguageModel) -> ir.Model:
    graph = ir.load(file)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in graph.graph.initializers:
            graph.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    return graph
