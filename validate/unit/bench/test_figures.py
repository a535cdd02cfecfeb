"""Bytes, operations and ratios are what they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from crt_export.bench.process_memory import cached_share, peak_rss, usage
from crt_export.bench.rounds import paired_ratio, quantiles
from crt_export.bench.step_cost import step_bytes, step_flops, weights_from_graph
from crt_export.config import ModelConfig
from crt_export.errors import BundleError

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


@pytest.mark.parametrize("precision", ["fp32", "w8"])
def test_initializers_are_those_that_onnx_reads_and_tables_count_by_their_rows(precision: str) -> None:
    path = GOLDEN / "graphs" / f"step.{precision}.onnx"
    weights = weights_from_graph(path)
    found = {tensor.name: tensor for tensor in weights.initializers}
    model = onnx.load(path)
    sizes = {
        tensor.name: onnx.numpy_helper.to_array(tensor).nbytes
        for tensor in model.graph.initializer
        if any(tensor.name in node.input for node in model.graph.node)
    }
    assert {name: tensor.bytes for name, tensor in found.items()} == sizes
    assert {name for name, tensor in found.items() if tensor.gathered} == {"embed.weight", "rope_cos", "rope_sin"}
    tables = [tensor for tensor in found.values() if tensor.gathered]
    whole = sum(size for name, size in sizes.items() if not found[name].gathered)
    row = sum(sizes[tensor.name] // tensor.dims[0] for tensor in tables)
    assert weights.bytes_read(1) == whole + row
    assert weights.bytes_read(3) == whole + 3 * row
    assert weights.bytes_read(10**9) == sum(sizes.values())  # no more rows than a table has


@pytest.mark.parametrize("content", [b"", b"\x3a\x05\x0a", b"no graph at all", b"\xff" * 40])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"step\.onnx is not a usable ONNX file"):
        weights_from_graph(path)


def test_bytes_and_operations_of_a_step_are_counted_by_hand(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config()  # hidden 32, 2 layers, 4 heads of 8, inner 64, correction 48, vocabulary 256
    moved = step_bytes(config.info, weights=1000, position=9, batch=2, cache_item_bytes=4)
    assert (moved.cache, moved.states, moved.logits) == (2 * 10 * 2 * 2 * 32 * 4, 2 * 2 * 32 * 4, 2 * 256 * 4)
    assert moved.total == 1000 + moved.cache + moved.states + moved.logits
    linears = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 32 * 48 + 32 * 256
    attention = 2 * 2 * 32 * 10
    found = step_flops(config.carried, multiplied=linears, position=9, batch=2)
    assert found == 2 * 2 * (linears + attention)
    window = tiny_config(sliding_window=4)
    assert step_bytes(window.info, weights=0, position=9, batch=1, cache_item_bytes=4).cache == 4 * 512
    assert step_flops(window.carried, multiplied=0, position=9, batch=1) == 2 * 2 * 2 * 32 * 4
    plain = tiny_config(model_type="transformer")
    assert step_bytes(plain.info, weights=0, position=9, batch=1, cache_item_bytes=4).states == 0


def test_caches_of_few_heads_and_two_windows_are_counted_one_by_one(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(num_key_value_heads=1, layer_attention=[[4, 0], [None, 0]])
    assert step_bytes(config.info, weights=0, position=9, batch=1, cache_item_bytes=2).cache == 2 * 2 * 8 * (4 + 10)
    assert step_flops(config.carried, multiplied=0, position=9, batch=1) == 2 * 2 * 32 * (4 + 10)


@pytest.mark.parametrize("precision", ["fp32", "w8"])
def test_products_of_a_graph_multiply_every_linear_once(precision: str) -> None:
    """Rows of 16 lie in blocks of 128 with 8-bit weights; what fills a block is not multiplied."""
    linears = 4 * 16 * 16 + 2 * 16 * 32 + 2 * 16 * 32 + 16 * 256
    assert weights_from_graph(GOLDEN / "graphs" / f"step.{precision}.onnx").multiplied == linears


def test_a_weight_counts_for_every_product_that_reads_it_also_behind_a_scale(tmp_path: Path) -> None:
    floats, integers = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "shared"], ["a"]),
        onnx.helper.make_node("MatMul", ["a", "shared"], ["b"]),
        onnx.helper.make_node("DequantizeLinear", ["packed", "scale"], ["wide"]),
        onnx.helper.make_node("MatMul", ["b", "wide"], ["c"]),
        onnx.helper.make_node("MatMul", ["b", "c"], ["d"]),  # no weight
    ]
    tensors = [
        onnx.helper.make_tensor("shared", floats, [4, 4], [0.0] * 16),
        onnx.helper.make_tensor("packed", integers, [4, 5], [0] * 20),
        onnx.helper.make_tensor("scale", floats, [], [1.0]),
    ]
    path = tmp_path / "step.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "step", [], [], tensors)), path)
    assert weights_from_graph(path).multiplied == 16 + 16 + 20


def test_a_ratio_survives_a_drift_that_is_larger_than_it_and_shows_no_difference_where_there_is_none() -> None:
    generator = np.random.default_rng(0)
    drift = np.exp(generator.normal(0, 1, 40))  # a machine that is three times slower in one round than in the next
    own = [factor * (1 + 0.01 * generator.random(20)) for factor in drift]
    other = [1.1 * factor * (1 + 0.01 * generator.random(20)) for factor in drift]
    found = paired_ratio(own, other)
    assert found.low < 1.1 < found.high
    assert found.high - found.low < 0.01
    same = paired_ratio(own, own)
    assert (same.low, same.median, same.high) == (1, 1, 1)


def test_quantiles_keep_the_samples_in_order() -> None:
    found = quantiles([3.0, 1.0, 2.0])
    assert (found.p50, found.samples) == (2, (3, 1, 2))
    assert found.p10 < found.p50 < found.p90


def test_memory_figures_follow_what_is_allocated_and_read(tmp_path: Path) -> None:
    before = usage()
    if before.anonymous is None or before.pss is None:
        pytest.skip("this system has no /proc/self/smaps_rollup")
    held = np.ones(64 << 20, np.uint8)
    after = usage()
    assert after.anonymous is not None
    assert 60 << 20 < after.anonymous - before.anonymous < 80 << 20
    assert held.size <= (peak_rss() or 0)
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    assert cached_share(path) == 1  # just written
    (tmp_path / "nothing").touch()
    assert cached_share(tmp_path / "nothing") is None
