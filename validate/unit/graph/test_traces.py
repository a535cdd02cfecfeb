"""Graphs whose parts another process traced are the graphs that this one would have traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.child_process import ChildModule
from crt_export.errors import BuildError, UnsupportedError
from crt_export.graph import traces as traces_module
from crt_export.graph.export import GraphExporter, parts_of_graphs
from crt_export.graph.traces import TraceJob, start_traces
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint

GRAPHS = {"step": 1, "prefill": 3, "prefill_pass": 1, "head": 1}


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> LanguageModel:
    """FP16 with a residual stream of FP32, so that every dtype of a job matters."""
    checkpoint = load_checkpoint(make_checkpoint(num_hidden_layers=1, unroll_steps=3))
    return model_from_checkpoint(checkpoint, torch.float16, torch.float32)


def test_another_process_traces_the_same_graphs_byte_for_byte(model: LanguageModel) -> None:
    parts = parts_of_graphs(model.carried, GRAPHS.items())
    assert set(parts) == {"step", "prefill_pass", "reading_pass", "head"}
    job = TraceJob(parts=parts, dtype="float16", residual_dtype="float32")
    with start_traces(model.config, [job]) as traces:
        assert traces.of(type(model)(model.config)) == {}, "no job was for an FP32 model"
        found = traces.of(model)
    assert set(found) == set(parts)
    here, there = GraphExporter(model), GraphExporter(model, found)
    for name, unroll in GRAPHS.items():
        ours, theirs = here.graph(name, unroll=unroll), there.graph(name, unroll=unroll)
        assert ir.to_proto(ours).SerializeToString() == ir.to_proto(theirs).SerializeToString()
        np.testing.assert_array_equal(
            theirs.graph.initializers["final_norm.weight"].const_value.numpy(),  # type: ignore[union-attr]
            model.final_norm.weight.numpy(),
        )


def test_without_jobs_no_process_is_started(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "ChildModule", None)
    with start_traces(model.config, []) as traces:
        assert traces.of(model) == {}


def test_a_deliberate_error_comes_back_as_what_it_was(make_checkpoint: Callable[..., Path]) -> None:
    plain = load_checkpoint(make_checkpoint(model_type="transformer", num_hidden_layers=1))
    job = TraceJob(parts=("prefill_pass",), dtype="float32", residual_dtype="float32")
    with start_traces(plain.config, [job]) as traces, pytest.raises(UnsupportedError, match="prefill_pass"):
        traces.of(model_from_checkpoint(plain))


def test_a_process_that_dies_is_one_clear_error(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "_MODULE", "crt_export.no_such_module")
    job = TraceJob(parts=("head",), dtype="float16", residual_dtype="float32")
    with (
        start_traces(model.config, [job]) as traces,
        pytest.raises(BuildError, match=r"exit code 1\n(.*\n)*.*no_such_module"),
    ):
        traces.of(model)


def test_leaving_the_block_ends_the_process() -> None:
    with ChildModule("http.server", "") as child:
        assert child._process.poll() is None
    assert child._process.poll() is not None


def test_what_lies_in_the_folder_of_the_caller_is_not_imported(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the caller')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])  # as a console script has it
    job = TraceJob(parts=("head",), dtype="float16", residual_dtype="float32")
    with start_traces(model.config, [job]) as traces:
        assert set(traces.of(model)) == {"head"}
