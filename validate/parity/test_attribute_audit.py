"""Attributes of a graph are the model's, also where a node leaves them out and ONNX has a default of its own."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from crt_export.checkpoint import Checkpoint
from crt_export.parity.graph_audit import attribute_problems


def _problems(checkpoint: Checkpoint, operator: str, attributes: dict[str, float]) -> list[str]:
    """Of one node in a model with eps 1e-6."""
    config = dataclasses.replace(checkpoint.config, norm_eps=1e-6)
    node = ir.node(operator, [ir.val("x")], attributes=attributes, name="it")
    graph = ir.Graph([], [], nodes=[node], opset_imports={"": 24})
    return [*attribute_problems(ir.Model(graph, ir_version=10), config)]


def test_an_epsilon_that_is_absent_is_that_of_onnx(parity_checkpoint: Checkpoint) -> None:
    assert _problems(parity_checkpoint, "LayerNormalization", {"epsilon": 1e-6}) == []
    assert _problems(parity_checkpoint, "LayerNormalization", {}) == [
        "epsilon of LayerNormalization is 1e-05 by default in 1 nodes (it), expected 1e-06"
    ]


def test_a_scale_that_is_absent_is_that_of_the_head_dim(parity_checkpoint: Checkpoint) -> None:
    assert _problems(parity_checkpoint, "Attention", {}) == []
    (head_dim,) = {cache.head_dim for cache in parity_checkpoint.config.carried.caches}
    assert _problems(parity_checkpoint, "Attention", {"scale": head_dim**-0.5}) == []
    assert len(_problems(parity_checkpoint, "Attention", {"scale": 0.9})) == 1


def test_pairs_of_a_rotation_that_are_not_given_are_halves(parity_checkpoint: Checkpoint) -> None:
    config = parity_checkpoint.config
    for layout, absent in (("interleaved", 1), ("half", 0)):
        other = dataclasses.replace(parity_checkpoint, config=dataclasses.replace(config, rope_layout=layout))
        assert len(_problems(other, "RotaryEmbedding", {})) == absent
        assert _problems(other, "RotaryEmbedding", {"interleaved": absent}) == []
        assert _problems(other, "RotaryEmbedding", {"interleaved": 1 - absent}) == [
            f"interleaved of RotaryEmbedding is {1 - absent} in 1 nodes (it), expected {absent}"
        ]
    assert len(_problems(other, "RotaryEmbedding", {"rotary_embedding_dim": 4})) == 1


def test_other_defaults_are_the_models(parity_checkpoint: Checkpoint) -> None:
    assert _problems(parity_checkpoint, "Gelu", {}) == []
    assert len(_problems(parity_checkpoint, "Attention", {"is_causal": 1})) == 1
