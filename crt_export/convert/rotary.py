"""Frequencies of rotary embeddings, from the keys of ``config.json`` in both of their forms.

transformers 5 writes ``rope_parameters`` (for some families one object per kind of layer); 4 wrote ``rope_theta``,
``rope_scaling`` with ``type`` or ``rope_type``, and keys of single families. Frequencies are computed in float32 in the
order of transformers: at position 8,000 a frequency in float64 gives other angles than the model was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crt_export.config import is_finite_number
from crt_export.convert.keys import Keys
from crt_export.errors import CheckpointError, UnsupportedError

_MOST_CHANNELS = 1 << 16
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class RotarySet:
    """One way to turn keys.

    Attributes:
        frequencies: Radians per position, [head_dim/2]; 0 behind the ``channels`` that are turned.
        channels: How many channels of a head are turned, the first ones.
        factor: What cosine and sine are multiplied by.
    """

    frequencies: tuple[float, ...]
    channels: int
    factor: float = 1.0


def read_rotary(
    keys: Keys, head_dim: int, positions: int, *, theta: float = 10000.0, partial: float | None = None
) -> RotarySet:
    """The one set of a family whose layers are all alike.

    Args:
        keys: Of ``config.json``.
        head_dim: Channels of a head.
        positions: ``max_position_embeddings`` of the source.
        theta: Base of the family.
        partial: Share of the channels that the family turns by default; None: it turns all of them, whatever.
    """
    parameters, scaling = keys.mapping("rope_parameters"), keys.mapping("rope_scaling")
    theta = keys.number("rope_theta", theta)
    if partial is None:
        keys.only("partial_rotary_factor", 1.0, why="this family turns all channels")
    else:
        partial = keys.number("partial_rotary_factor", partial)
    return rotary_set(_one_of(parameters, scaling), head_dim, positions, theta=theta, partial=partial)


def read_rotary_by_layer(
    keys: Keys, head_dim: int, positions: int, *, theta: float, local_key: str | None, local_theta: float
) -> dict[str, RotarySet]:
    """The sets of a family that turns keys of full and of sliding layers differently.

    Args:
        keys: Of ``config.json``.
        head_dim: Channels of a head.
        positions: ``max_position_embeddings`` of the source.
        theta: Base of the family's full layers.
        local_key: What transformers 4 called the base of sliding layers; None: it had none of their own.
        local_theta: That of the family.
    """
    parameters, scaling = keys.mapping("rope_parameters"), keys.mapping("rope_scaling")
    full = keys.number("rope_theta", theta)
    local = keys.number(local_key, local_theta) if local_key else full
    if parameters is not None and not set(parameters) <= {FULL, SLIDING}:
        raise UnsupportedError(
            f"rope_parameters of one kind for all layers: {parameters!r:.120}, expected {FULL} and {SLIDING}"
        )
    if parameters is not None and scaling is not None:
        _one_of(parameters, scaling)
    given = parameters or {FULL: scaling}
    return {
        kind: rotary_set(given.get(kind), head_dim, positions, theta=base, whole=False)
        for kind, base in ((FULL, full), (SLIDING, local))
    }


def _one_of(parameters: dict[str, Any] | None, scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    if parameters is not None and scaling is not None and parameters != scaling:
        raise UnsupportedError("config.json has rope_parameters and rope_scaling, which contradict each other")
    return scaling if parameters is None else parameters


def rotary_set(
    parameters: Mapping[str, Any] | None,
    head_dim: int,
    positions: int,
    *,
    theta: float,
    partial: float | None = None,
    whole: bool = True,
) -> RotarySet:
    """Frequencies by one object of parameters.

    Args:
        parameters: ``rope_parameters``, or ``rope_scaling``; None: the default type.
        head_dim: Channels of a head.
        positions: ``max_position_embeddings`` of the source.
        theta: Base where the object names none.
        partial: Likewise the share of channels that are turned; None: all, and the object may not say otherwise.
        whole: Whether the object is that of all layers.

    Raises:
        UnsupportedError: A type, or a key of it, that this version does not know.
        CheckpointError: A value is missing or of the wrong type.
    """
    if head_dim > _MOST_CHANNELS:
        raise CheckpointError(f"config.json: heads of {head_dim} channels, expected at most {_MOST_CHANNELS}")
    if not isinstance(parameters, Mapping | None):
        raise CheckpointError(f"config.json: rotary parameters must be an object, found {parameters!r:.60}")
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedError(f"rope_type {kind!r:.40}: {_REASONS.get(str(kind), 'not known to this version')}")
    compute, needed, optional = _KINDS[kind]
    unknown = set(given) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *needed, *optional}
    if unknown:
        raise UnsupportedError(f"rope_type {kind}: unknown {', '.join(sorted(unknown))}")
    if not whole and given.get("truncate", True) is not True:
        raise UnsupportedError("rope_type yarn: truncate per kind of layer")
    given.setdefault("rope_theta", theta)
    if partial is None and given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("partial_rotary_factor: this family turns all channels")
    given.setdefault("partial_rotary_factor", partial or 1.0)
    if kind in ("yarn", "llama3"):
        given.setdefault("original_max_position_embeddings", positions)
    wrong = [
        name
        for name in (*needed, *sorted(_NUMBERS))
        if (name in needed or name in given) and not _is_above_0(given.get(name))
    ]
    if wrong:
        raise CheckpointError(f"rope_type {kind}: a number above 0 is needed for {', '.join(dict.fromkeys(wrong))}")
    channels = int(head_dim * given["partial_rotary_factor"])
    if channels % 2 or not 0 < channels <= head_dim:
        raise UnsupportedError(f"{channels} of {head_dim} channels turned, expected an even number of them")
    try:
        frequencies, factor = compute(given, channels)
    except ArithmeticError:
        frequencies, factor = torch.tensor([math.nan]), 1.0
    if not bool(torch.isfinite(frequencies).all()) or not math.isfinite(factor):
        raise CheckpointError(f"rope_type {kind}: its parameters give no frequencies")
    values = [*frequencies.double().tolist(), *[0.0] * ((head_dim - channels) // 2)]
    return RotarySet(frequencies=tuple(values), channels=channels, factor=factor)


def _is_above_0(value: object) -> bool:
    return is_finite_number(value) and float(value) > 0  # type: ignore[arg-type]


def _default(given: Mapping[str, Any], channels: int) -> tuple[Tensor, float]:
    return 1.0 / (given["rope_theta"] ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)), 1.0


def _linear(given: Mapping[str, Any], channels: int) -> tuple[Tensor, float]:
    return _default(given, channels)[0] / given["factor"], 1.0


def _llama3(given: Mapping[str, Any], channels: int) -> tuple[Tensor, float]:
    frequencies = _default(given, channels)[0]
    factor, low, high = (given[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = given["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelength - low) / (high - low)
    between = ~(wavelength < length / high) & ~(wavelength > length / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled), 1.0


def _yarn(given: Mapping[str, Any], channels: int) -> tuple[Tensor, float]:
    factor, length, theta = given["factor"], given["original_max_position_embeddings"], given["rope_theta"]

    def scale(by: float = 1) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    attention = given.get("attention_factor")
    if attention is None:
        attention = scale(mscale) / scale(all_dim) if mscale and all_dim else scale()

    def dim_at(rotations: float) -> float:
        return channels * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_at(given.get("beta_fast") or 32), dim_at(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    ramp = ((torch.arange(channels // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    powers = theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    extrapolated = 1 - ramp
    return 1.0 / (factor * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated, float(attention)


_Compute = Callable[[Mapping[str, Any], int], tuple[Tensor, float]]
_LENGTH = "original_max_position_embeddings"
#: By type: how, the numbers that it needs, and what else it may have.
_KINDS: Mapping[str, tuple[_Compute, tuple[str, ...], tuple[str, ...]]] = {
    "default": (_default, (), ()),
    "linear": (_linear, ("factor",), ()),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor", _LENGTH), ()),
    "yarn": (
        _yarn,
        ("factor", _LENGTH),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_NUMBERS = {
    "rope_theta",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}
_CHANGING = "the frequencies change with the length of the text, keys that are cached do not"
_REASONS = {
    "dynamic": _CHANGING,
    "longrope": f"{_CHANGING}; take the sibling with the short context, such as Phi-3-mini-4k",
    "su": _CHANGING,
}
