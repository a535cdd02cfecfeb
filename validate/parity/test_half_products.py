"""FP16 products taken in FP32: where they round, what they replace, and what a reference on fewer windows computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.layers import Linear
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.windows import ParityOptions, windows_from_text
from crt_export.quantize.emulation import WideLinear, emulate_fp16
from crt_export.text import TokenText


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    linear = Linear(*weight.shape, bias=bias is not None).requires_grad_(False)
    linear.weight.data = weight.half()
    if linear.bias is not None and bias is not None:
        linear.bias.data = bias.half()
    return linear


def test_product_is_rounded_before_the_bias_is_added() -> None:
    # 2049 lies between two FP16 numbers, 2048 and 2050: rounded to even first, then 1 more is rounded again.
    linear = _linear(torch.tensor([[1024.0], [1025.0]]), torch.tensor([1.0]))
    x = torch.ones(1, 2).half()
    assert float(WideLinear(linear)(x)) == float(linear(x)) == 2048.0


def test_sum_is_fp32() -> None:
    # 4096 ones beside 2048 ones: FP16 has no 2049, so a sum in FP16 would stay at 2048.
    linear = _linear(torch.ones(4096, 1), None)
    assert float(WideLinear(linear)(torch.ones(1, 4096).half())) == 4096.0


def test_overflow_is_infinite() -> None:
    linear = _linear(torch.full((2, 1), 60000.0), None)
    found = WideLinear(linear)(torch.ones(1, 2).half())
    assert found.dtype == torch.float16
    assert bool(torch.isinf(found).all())


@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_pytorchs_own_product(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator) * 0.05
    linear = _linear(weight, torch.randn(512, generator=generator) if bias else None)
    x = torch.randn(4, 3, 256, generator=generator).half()
    found, own = WideLinear(linear)(x).double(), linear(x).double()
    # Two sums that differ in their last FP32 bit may round to neighbours: the spacing of FP16 at the product's size.
    size = own.abs() + (0.0 if linear.bias is None else linear.bias.double().abs())
    spacing = 2.0**-10 * size + 1e-5
    assert bool(((found - own).abs() <= spacing).all())
    assert float((found == own).double().mean()) > 0.98


def test_every_linear_is_replaced(parity_checkpoint) -> None:
    model = emulate_fp16(model_from_checkpoint(parity_checkpoint, torch.float16))
    assert not [name for name, module in model.named_modules() if isinstance(module, Linear)]
    wide = [module for module in model.modules() if isinstance(module, WideLinear)]
    assert wide
    assert {module.weight.dtype for module in wide} == {torch.float32}
    exact = model_from_checkpoint(parity_checkpoint, torch.float16)
    assert torch.equal(model.lm_head.weight.half(), exact.lm_head.weight)


def _reference(checkpoint) -> Reference:
    config: ModelConfig = checkpoint.config
    ids = np.arange(4 * 16 + 1, dtype=np.int64) * 7 % config.vocab_size
    text = TokenText(ids=ids, source="test", offset=0)
    options = ParityOptions(validation_tokens=64, window=16, short_reason="a test")
    windows = windows_from_text(text, options, longest=16, longest_reason="test")
    return Reference(model_from_checkpoint(checkpoint), windows, batch=4)


def test_first_windows_do_not_compute_again(parity_checkpoint, monkeypatch) -> None:
    reference = _reference(parity_checkpoint)
    whole = reference.hidden(STEP, 1)
    monkeypatch.setattr(LanguageModel, "sequential", lambda *_: pytest.fail("the recurrence ran again"))
    part = reference.first_windows(2)
    assert part.windows.count == 2
    assert torch.equal(part.hidden(STEP, 1), whole[:2])


def test_first_windows_of_a_fresh_reference_compute_only_those(parity_checkpoint) -> None:
    reference = _reference(parity_checkpoint)
    part = reference.first_windows(2).hidden(STEP, 1)
    assert part.shape[0] == 2
    torch.testing.assert_close(part, reference.hidden(STEP, 1)[:2])
