"""FP16 and W8A8 arithmetic in PyTorch, on the model itself.

ONNX Runtime's CPU kernels hide FP16 overflow, and an engine for another device does not run where it is compiled. The
half-precision model with these linears rounds where the graph rounds, so it shows both what a precision costs and how
large every FP16 tensor gets. Parity runs its step chain as ``pytorch-half``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from crt_export.models.base import LanguageModel
from crt_export.models.layers import Linear
from crt_export.quantize.plan import LEVELS, QuantizedInput, QuantizedLinear, QuantizedLinears


class WideLinear(nn.Module):
    """``y = half(x @ weight) + bias`` of FP16 values, summed in FP32; what is added to the product stays FP16.

    A GPU multiplies FP16 in this way, and so does PyTorch on a CPU, but some ten times slower than it multiplies FP32.
    An FP16 number is an FP32 number too, so the same product is taken of the widened operands: what differs is the
    order of the FP32 sum alone, which no two processors have in common.

    Attributes:
        weight: The linear's FP16 values, float32 [in, out].
        bias: float16 [out], or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().float())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """float16 [..., in] -> float16 [..., out]; a sum beyond FP16's range becomes infinite, as it does there."""
        y = torch.matmul(x.float(), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class EmulatedLinear(nn.Module):
    """What :mod:`crt_export.quantize.w8a8` emits for one linear, from the Cast to FP32 to the Cast back."""

    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, quantized_input: QuantizedInput, linear: QuantizedLinear) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(quantized_input.scale)))
        self.register_buffer("shift", torch.tensor(float(quantized_input.shift)))
        self.register_buffer("weight", torch.from_numpy(linear.weight * linear.weight_scale))
        self.register_buffer("bias", None if linear.bias is None else torch.from_numpy(linear.bias))

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.round((x.float() - self.shift) / self.scale).clamp(-LEVELS - 1, LEVELS)
        y = torch.matmul(levels * self.scale, self.weight)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def emulate_fp16(model: LanguageModel) -> LanguageModel:
    """The model itself with its linears replaced, one at a time.

    Args:
        model: Weights float16.

    Returns:
        The same model. Its weights of linears take twice the memory.
    """
    return _with_linears(model, lambda _, linear: WideLinear(linear))


def emulate_w8a8(model: LanguageModel, quantized: QuantizedLinears) -> LanguageModel:
    """A copy of the model with folded LayerNorms and quantised linears.

    Args:
        model: Of any dtype; float16 gives the arithmetic of the W8A8 graphs, float32 the cost of quantisation alone.
        quantized: Of the same checkpoint.

    Returns:
        The copy; weights of its linears are float32.
    """
    emulated = copy.deepcopy(model)
    for name, values in quantized.norms.items():
        parameter = emulated.get_parameter(name)
        parameter.data = torch.from_numpy(values.copy()).to(parameter.dtype)
    inputs, linears = quantized.plan.inputs, quantized.linears
    return _with_linears(emulated, lambda name, _: EmulatedLinear(inputs[linears[name].input], linears[name]))


def _with_linears(model: LanguageModel, made: Callable[[str, Linear], nn.Module]) -> LanguageModel:
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear)]:
        parent, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        setattr(model.get_submodule(parent), attribute, made(name, linear))
    return model
