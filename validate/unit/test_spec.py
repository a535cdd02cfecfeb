"""One comparison of tensor contracts: every difference is a sentence, and each kind of file has its rule for dims."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from crt_export.spec import GraphSpec, TensorSpec, compatible_sizes, interface_problems, same_dims, same_sizes

IDS = TensorSpec(name="input_ids", dtype="int64", dims=("batch", 1))
STATE = TensorSpec(name="state", dtype="float32", dims=("batch", 1, 16))
LOGITS = TensorSpec(name="logits", dtype="float32", dims=("batch", 256))


def _graph(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (LOGITS,)) -> GraphSpec:
    return GraphSpec(name="step", inputs=inputs, outputs=outputs, aliases=())


def _like(spec: TensorSpec, *dims: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=spec.name, dtype=dtype, dims=dims)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (_graph(IDS), "input state: float32 [batch, 1, 16] expected, nothing found"),
        (_graph(IDS, STATE, LOGITS), "input logits: float32 [batch, 256] found, which is not part of the contract"),
        (_graph(STATE, IDS), "inputs expected in order input_ids, state, found in order state, input_ids"),
        (
            _graph(IDS, _like(STATE, "batch", 1, 16, dtype="float16")),
            "input state: float32 [batch, 1, 16] expected, state: float16 [batch, 1, 16] found",
        ),
        (
            _graph(IDS, STATE, outputs=(_like(LOGITS, "batch", 1, 256),)),
            "output logits: float32 [batch, 256] expected, logits: float32 [batch, 1, 256] found",
        ),
    ],
)
def test_every_difference_is_one_sentence(found: GraphSpec, problem: str) -> None:
    assert [*interface_problems(_graph(IDS, STATE), _graph(IDS, STATE))] == []
    assert [*interface_problems(_graph(IDS, STATE), found)] == [problem]


@pytest.mark.parametrize(
    ("same", "dims", "agree"),
    [
        (same_dims, ("rows", 256), False),
        (same_sizes, (-1, 256), True),
        (same_sizes, (-1, -1), False),
        (same_sizes, (4, 256), False),
        (compatible_sizes, ("rows", 256), True),
        (compatible_sizes, (4, "columns"), True),
        (compatible_sizes, (4, 255), False),
    ],
)
def test_what_dims_must_agree_in(same: Callable[..., bool], dims: tuple[int | str, ...], agree: bool) -> None:
    found = _graph(IDS, outputs=(_like(LOGITS, *dims),))
    inputs = _graph(_like(IDS, -1, 1, dtype="int64"), outputs=found.outputs) if same is same_sizes else found
    assert ([*interface_problems(_graph(IDS), inputs, same)] == []) is agree


def test_the_comparison_needs_no_onnx() -> None:
    code = "import sys, crt_export.spec; sys.exit(any(name.startswith('onnx') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
