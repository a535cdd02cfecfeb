"""The rotation as equations, as an operator of PyTorch and as a node of a graph are one function."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from crt_export.engine.ort import import_onnxruntime
from crt_export.rotary import frequencies_from_base, rope_at, rope_tables, rotary_embedding, rotate

POSITIONS = torch.tensor([[0, 1, 2], [7, 8, 9]])
HEADS, HEAD_DIM = 3, 10


def _inputs() -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(*POSITIONS.shape, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    return x, rope_tables(16, frequencies_from_base(10000.0, HEAD_DIM))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_a_pair_turns_by_its_angle(layout: str) -> None:
    x, tables = _inputs()
    turned = rotate(x, rope_at(tables, POSITIONS), layout)
    row, head, token, pair = 1, 2, 1, 3
    first, second = (2 * pair, 2 * pair + 1) if layout == "interleaved" else (pair, pair + HEAD_DIM // 2)
    a, b = (float(x[row, head, token, channel]) for channel in (first, second))
    angle = float(POSITIONS[row, token]) * 10000.0 ** (-2 * pair / HEAD_DIM)
    expected = complex(a, b) * complex(np.cos(angle), np.sin(angle))
    found = complex(float(turned[row, head, token, first]), float(turned[row, head, token, second]))
    assert abs(found - expected) < 1e-6


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_operator_and_node_compute_the_rotation(layout: str) -> None:
    x, tables = _inputs()
    expected = rotate(x, rope_at(tables, POSITIONS), layout)
    cos, sin = (table[POSITIONS] for table in tables)
    interleaved = layout == "interleaved"
    assert torch.equal(rotary_embedding(x, cos, sin, interleaved), expected)
    torch.library.opcheck(rotary_embedding, (x, cos, sin, interleaved))
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"], interleaved=int(interleaved))
    values = {"x": x, "cos": cos, "sin": sin}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [*value.shape]) for name, value in values.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x.shape])
    graph = helper.make_graph([node], "rotation", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.contiguous().numpy() for name, value in values.items()})[0]
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=1e-6)
