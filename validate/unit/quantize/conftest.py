"""Models, real text and exported graphs for the tests of quantisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.engine.ort import import_onnxruntime
from crt_export.graph.export import GraphExporter
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.quantize.calibration import ActivationStatistics, CalibrationOptions, calibrate, calibration_windows
from crt_export.quantize.linears import linear_inputs

SEQ = 16
UNROLL = 2
OPTIONS = CalibrationOptions(windows=64, minimum_tokens=512)


@pytest.fixture(scope="session")
def text_tokens(train_text: Path) -> np.ndarray:
    """Bytes of real text, int64 [tokens]."""
    return np.frombuffer(train_text.read_bytes(), np.uint8).astype(np.int64)


@pytest.fixture(scope="session")
def calibrated(text_tokens: np.ndarray) -> Callable[[LanguageModel], ActivationStatistics]:
    """``calibrated(model)``: statistics on real text at the sizes of the tiny models."""

    def run(model: LanguageModel) -> ActivationStatistics:
        windows = calibration_windows(text_tokens, seq=SEQ, options=OPTIONS)
        return calibrate(model, windows, unroll=UNROLL, options=OPTIONS)

    return run


@pytest.fixture(scope="session")
def small(make_checkpoint: Callable[..., Path], shared_traces: None) -> Checkpoint:
    """A one-layer CRT."""
    return load_checkpoint(make_checkpoint(num_hidden_layers=1))


@pytest.fixture(scope="session")
def exported(small: Checkpoint) -> Callable[[str, torch.dtype], ir.Model]:
    """``exported(graph, dtype)``: a fresh copy of the small model's graph."""
    exporter = functools.cache(lambda dtype: GraphExporter(model_from_checkpoint(small, dtype)))
    return lambda graph, dtype: exporter(dtype).graph(graph, unroll=UNROLL if graph == "prefill" else 1)


@pytest.fixture(scope="session")
def run_graph() -> Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """``run_graph(graph, inputs) -> outputs`` in ONNX Runtime on the CPU."""
    sessions: dict[int, tuple[ir.Model, Any]] = {}

    def run(graph: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if id(graph) not in sessions:
            options = import_onnxruntime().SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            # As crt_export.engine.ort does: fused, the product of uint8 and int8 saturates on CPUs without VNNI.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            data = ir.to_proto(graph).SerializeToString()
            sessions[id(graph)] = graph, import_onnxruntime().InferenceSession(data, options)
        session = sessions[id(graph)][1]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    return run


@pytest.fixture(scope="session")
def step_chain(
    run_graph: Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> Callable[[ir.Model, LanguageModel, np.ndarray], np.ndarray]:
    """``step_chain(step_graph, model, ids) -> logits`` float32 [batch, seq, vocab], token by token."""

    def run(graph: ir.Model, model: LanguageModel, ids: np.ndarray) -> np.ndarray:
        config, (batch, seq) = model.config, ids.shape
        carried = {
            value.name: np.zeros((batch, config.num_attention_heads, seq, config.head_dim), value.dtype.numpy())
            for value in graph.graph.inputs
            if value.name and value.dtype and value.name.startswith("past_key_values.")
        }
        state = np.zeros((batch, 1, config.hidden_size), np.float32)
        logits = []
        for t in range(seq):
            token = {"input_ids": ids[:, t : t + 1], "position": np.full(batch, t, np.int64)}
            out = run_graph(graph, {**token, **carried, "state": state})
            logits.append(out["logits"])
            carried = {name: out[name.replace("past_", "present_")] for name in carried}
            state = out["next_state"]
        return np.stack(logits, axis=1)

    return run


@pytest.fixture(scope="session")
def with_outliers() -> Callable[[LanguageModel, float], LanguageModel]:
    """``with_outliers(model, factor)``: LayerNorm channels times factor, the weights that read them divided by it.

    The function is unchanged; this is what trained larger models look like.
    """

    def scale(model: LanguageModel, factor: float) -> LanguageModel:
        generator = torch.Generator().manual_seed(1)
        for group in linear_inputs(model.config):
            if group.norm is None:
                continue
            channels = torch.randperm(model.config.hidden_size, generator=generator)[:4]
            norm = model.get_submodule(group.norm)
            for parameter in norm.parameters():
                parameter.data[channels] *= factor
            for name in group.linears:
                model.get_parameter(f"{name}.weight").data[channels] /= factor
        return model

    return scale
