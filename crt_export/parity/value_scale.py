"""What smoothing divided the channels of the value caches by.

SmoothQuant may trade scale between v and o (:mod:`crt_export.quantize.smooth`), so the value cache of a ``w8a8`` target
holds the reference's values divided by one power of two per channel. A bundle does not store the factors; they are read
off the step graph's weights. The one that a channel was divided by is the power of two that best explains its whole
column of ``v``: the factors of its inputs are known from the LayerNorm before it, whose gain was divided by them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.checkpoint import Checkpoint
from crt_export.errors import ContractError, problem_list
from crt_export.parity.case import ParityCase

Floats = NDArray[np.float64]


def value_divisors(case: ParityCase, checkpoint: Checkpoint) -> tuple[NDArray[np.float32], ...]:
    """Per layer, what the target's values have to be multiplied by to be the reference's.

    Args:
        case: The target; only its step graph is read.
        checkpoint: What it was made of.

    Returns:
        Powers of two, float32 [heads, 1, cache head dim]; ones in every precision but ``w8a8``.

    Raises:
        ContractError: The step graph is missing, unreadable, or lacks the weights that tell.
    """
    config = checkpoint.config
    ones = np.ones((config.num_attention_heads, 1, case.cache_head_dim), np.float32)
    if case.precision != "w8a8":
        return (ones,) * config.num_hidden_layers
    weights = _initializers(case)
    problems = _weight_problems(checkpoint, weights)
    if problems:
        raise ContractError(problem_list(f"{case.graphs['step']}: weights of v", problems))
    divisors = []
    for layer in range(config.num_hidden_layers):
        found = _divisors(f"layers.{layer}", checkpoint, weights).reshape(config.num_attention_heads, 1, -1)
        whole = ones.copy()
        whole[:, :, : config.head_dim] = found[:, :, : config.head_dim]
        divisors.append(whole)
    return tuple(divisors)


def _weight_problems(checkpoint: Checkpoint, weights: dict[str, NDArray]) -> list[str]:
    hidden = checkpoint.config.hidden_size
    shapes = {"attn_norm.weight": (hidden,), "attn_norm.bias": (hidden,)}
    shapes |= {"attn.v.weight_q": (hidden, hidden), "attn.v.weight_scale": (hidden,)}
    expected = {
        f"layers.{layer}.{name}": shape
        for layer in range(checkpoint.config.num_hidden_layers)
        for name, shape in shapes.items()
    }
    return [
        f"{name}: expected {list(shape)}, found {list(weights[name].shape) if name in weights else 'nothing'}"
        for name, shape in expected.items()
        if name not in weights or weights[name].shape != shape
    ]


def _divisors(layer: str, checkpoint: Checkpoint, weights: dict[str, NDArray]) -> Floats:
    """Powers of two, [channels of v in the file]; 1 where nothing tells."""
    stored = _dequantized(f"{layer}.attn.v", weights)
    original = checkpoint.tensors[f"{layer}.attn.v.weight"].T.double().numpy()
    factors = _input_factors(f"{layer}.attn_norm", checkpoint, weights)
    due = np.where(np.isnan(factors), 0, factors)[:, None] * original
    # The projection of the stored column on the due one is 1 / divisor, up to the rounding to 8 bits.
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = np.rint(-np.log2(np.abs((stored * due).sum(axis=0) / (due * due).sum(axis=0))))
    return np.exp2(np.where(np.isfinite(exponents), exponents, 0))


def _input_factors(norm: str, checkpoint: Checkpoint, weights: dict[str, NDArray]) -> Floats:
    """What smoothing divided each channel of a LayerNorm by, [hidden]; NaN where gain and bias are zero."""
    factors = np.full(checkpoint.config.hidden_size, np.nan)
    for part in ("bias", "weight"):  # the gain last: it is rarely small
        original = checkpoint.tensors[f"{norm}.{part}"].double().numpy()
        stored = weights[f"{norm}.{part}"].astype(np.float64)
        usable = (original != 0) & (stored != 0)
        ratio = np.abs(original[usable] / stored[usable])
        factors[usable] = np.exp2(np.rint(np.log2(ratio)))
    return factors


def _dequantized(linear: str, weights: dict[str, NDArray]) -> Floats:
    """[in, out]."""
    return weights[f"{linear}.weight_q"].astype(np.float64) * weights[f"{linear}.weight_scale"]


def _initializers(case: ParityCase) -> dict[str, NDArray]:
    """The initializers of the step graph that have to do with values, by name."""
    path = case.graphs.get("step", Path("step"))
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a damaged file
        raise ContractError(f"{path}: not a readable ONNX file ({error})") from error
    wanted = ("attn_norm.weight", "attn_norm.bias", "attn.v.weight_q", "attn.v.weight_scale")
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name.endswith(wanted) and value.const_value is not None
    }
