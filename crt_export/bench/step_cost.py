"""What one step cannot do without: the bytes it has to move and the operations it has to carry out."""

from __future__ import annotations

from collections.abc import Iterable

from crt_export.bench.graph_file import Initializer
from crt_export.bench.report import StepBytes
from crt_export.config import ModelConfig

_LOGIT_BYTES = 4  # float32 in every precision


def weight_bytes(initializers: Iterable[Initializer], batch: int) -> int:
    """Bytes of weights that a step reads: all of them once, of tables (embedding, rotary) one entry a row."""
    return sum(tensor.bytes_read(batch) for tensor in initializers)


def step_bytes(config: ModelConfig, *, weights: int, position: int, batch: int, cache_item_bytes: int) -> StepBytes:
    """Bytes that a step moves at least.

    Args:
        config: The model.
        weights: Bytes of weights, see :func:`weight_bytes`.
        position: Tokens in the cache before the step.
        batch: Rows.
        cache_item_bytes: Size of one element of the cache.
    """
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cache_item_bytes
    cache = batch * attended(config, position) * entry
    logits = batch * config.vocab_size * _LOGIT_BYTES
    return StepBytes(weights=weights, cache=cache, logits=logits, total=weights + cache + logits)


def step_flops(config: ModelConfig, *, position: int, batch: int) -> int:
    """Floating point operations of a step, two for each multiply-add of a matrix product; the rest is negligible."""
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 2 * config.num_attention_heads * config.head_dim * attended(config, position)
    layer = 4 * hidden * hidden + 2 * hidden * inner + attention
    correction = 2 * hidden * (config.correction_intermediate_size or 0) if config.recurrent else 0
    return 2 * batch * (config.num_hidden_layers * layer + correction + hidden * config.vocab_size)


def attended(config: ModelConfig, position: int) -> int:
    """Tokens that the token at a position sees, itself included."""
    used = position + 1
    return used if config.sliding_window is None else min(used, config.sliding_window)
