"""What an observer reports of one FP16 tensor: its largest magnitude, and infinity where a value is NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from crt_export.engine.onnxruntime import load_graph
from crt_export.parity.headroom import OUTPUT, observe_fp16


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([1.0, -3.0, 2.0], 3.0),
        ([1.0, np.nan, -3.0], np.inf),
        ([np.nan, np.nan, np.nan], np.inf),
        ([np.inf, -np.inf, 1.0], np.inf),
        ([-65504.0, 65504.0, 65504.0], 65504.0),
        ([0.0, -0.0, 0.0], 0.0),
    ],
)
def test_largest_magnitude_of_a_tensor(tmp_path: Path, values: list[float], largest: float) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negated", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    observed = observe_fp16(model)
    onnx.save(model, tmp_path / "negated.onnx")
    found = load_graph(tmp_path / "negated.onnx", threads=1).run({"x": np.array(values, np.float16)})[OUTPUT]
    assert observed.largest(found) == {"y": largest}
