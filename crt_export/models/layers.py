"""Layers that architectures are built of. Linears hold their weight as [in, out]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with tanh in place of the error function."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)^2``."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu_squared": relu_squared, "silu": F.silu}
)


class Linear(nn.Module):
    """``y = x @ weight + bias`` with weight [in, out], so that no exported graph transposes a weight."""

    def __init__(self, into: int, out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(into, out))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """LayerNorm computed in the dtype of its input, delivered in the dtype of its weights.

    Args:
        shape: Of the gain and of the bias; the last dim is normalised.
        eps: Added to the variance.
    """

    def __init__(self, shape: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if gain.ndim == 1:
            return F.layer_norm(x, gain.shape, gain, bias, self.eps).to(self.weight.dtype)
        size = gain.shape[-1:]  # the operator takes one gain for all heads
        y = F.layer_norm(x, size, gain.new_ones(size), gain.new_zeros(size), self.eps)
        return (y * gain + bias).to(self.weight.dtype)


class RmsNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * gain``, computed and delivered like :class:`LayerNorm`."""

    def __init__(self, shape: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight.to(x.dtype)
        if gain.ndim == 1:
            return F.rms_norm(x, gain.shape, gain, self.eps).to(self.weight.dtype)
        size = gain.shape[-1:]  # the operator takes one gain for all heads
        return (F.rms_norm(x, size, gain.new_ones(size), self.eps) * gain).to(self.weight.dtype)


NORMS: Mapping[str, type[LayerNorm] | type[RmsNorm]] = MappingProxyType({"layer": LayerNorm, "rms": RmsNorm})


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A linear whose output channels reach another one's input unmixed, so that the two may trade scale.

    Attributes:
        producer: Name of the linear, beside its reader.
        heads: (Heads of the producer, heads of the reader's input): each block of the producer's channels is read
            by as many blocks.
        cached: Whether the channels lie in a cache on the way.
    """

    producer: str
    heads: tuple[int, int] = (1, 1)
    cached: bool = False


class DeclaresLinears:
    """What quantisation and audits may assume of a module's linears.

    Attributes:
        folds: Reader to what its input channels come from.
        one_sided: Linears that read the output of an activation, which is hardly ever negative.
        cached: Number of a cache to the linears whose results are its keys and its values.
    """

    folds: Mapping[str, Fold] = MappingProxyType({})
    one_sided: tuple[str, ...] = ()
    cached: Mapping[int, tuple[str, str]] = MappingProxyType({})


class Mlp(nn.Module, DeclaresLinears):
    """``down(act(up x))``, or ``down(act(gate x) * up x)`` where it is gated, hidden -> inner -> hidden."""

    def __init__(
        self, hidden: int, inner: int, activation: Activation, *, gated: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        if gated:
            self.gate = Linear(hidden, inner, bias=bias)
        self.up = Linear(hidden, inner, bias=bias)
        self.down = Linear(inner, hidden, bias=bias)
        #: An attribute, so that crt_export.parity.own_model_causes can try another one.
        self.activation = activation
        self._gated = gated
        if gated:
            self.folds = {"down": Fold(producer="up")}
        else:
            self.one_sided = ("down",)

    def forward(self, x: Tensor) -> Tensor:
        if self._gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))
