"""FP16 linears on a CPU: the product of FP16 operands summed in FP32 and rounded once, at the speed of FP32.

A GPU multiplies FP16 in this way, and so does PyTorch on a CPU, but some ten times slower than it multiplies FP32. An
FP16 number is an FP32 number too, so the same product is taken of the widened operands: what differs is the order of
the FP32 sum alone, which no two processors have in common.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crt_export.model import Linear, Model


class WideLinear(nn.Module):
    """``y = half(x @ weight) + bias`` of FP16 values, summed in FP32; what is added to the product stays FP16.

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


def widen_products(model: Model) -> Model:
    """Replace every FP16 linear of a model, in place, one at a time; linears of another kind stay as they are.

    Args:
        model: Weights float16.

    Returns:
        The same model. Its weights of linears take twice the memory.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear)]:
        parent, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        setattr(model.get_submodule(parent), attribute, WideLinear(linear))
    return model
