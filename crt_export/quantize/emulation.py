"""The W8A8 arithmetic in PyTorch, on the model itself.

ONNX Runtime's CPU kernels hide FP16 overflow, and an engine for another device does not run where it is compiled. The
half-precision model with emulated linears rounds where the graph rounds, so it shows both what quantisation costs and
how large every FP16 tensor gets. Parity runs its step chain as ``pytorch-half``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from crt_export.model import Model
from crt_export.quantize.plan import QuantizedInput, QuantizedLinear, W8A8Plan
from crt_export.quantize.ranges import LEVELS


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


def emulate_w8a8(model: Model, plan: W8A8Plan) -> Model:
    """A copy of the model with folded LayerNorms and quantised linears.

    Args:
        model: Of any dtype; float16 gives the arithmetic of the W8A8 graphs, float32 the cost of quantisation alone.
        plan: Made for the same checkpoint.

    Returns:
        The copy; weights of its linears are float32.
    """
    emulated = copy.deepcopy(model)
    for name, values in plan.norms.items():
        parameter = emulated.get_parameter(name)
        parameter.data = torch.from_numpy(values.copy()).to(parameter.dtype)
    for name, linear in plan.linears.items():
        parent, _, attribute = name.rpartition(".")
        setattr(emulated.get_submodule(parent), attribute, EmulatedLinear(plan.inputs[linear.input], linear))
    return emulated
