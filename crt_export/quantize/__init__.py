"""From the FP32 model and real text to INT8 graphs.

``calibrate`` observes the model, ``plan_w8a8`` decides every range once, ``quantize_linears`` makes the INT8 weights
and ``quantize_w8a8`` puts them into each FP16 graph. ``quantize_w8`` needs neither text nor plan: it replaces the
weights of FP32 graphs.
"""

from __future__ import annotations

from crt_export.quantize.calibration import (
    ActivationStatistics,
    CalibrationOptions,
    calibrate,
    calibration_windows,
)
from crt_export.quantize.emulation import emulate_fp16, emulate_w8a8
from crt_export.quantize.linears import LinearInput, expected_matmuls, linear_inputs, linear_names
from crt_export.quantize.plan import (
    PLAN_FILE,
    QuantizedInput,
    QuantizedLinear,
    QuantizedLinears,
    W8A8Plan,
    plan_w8a8,
    quantize_linears,
    read_plan,
)
from crt_export.quantize.smoothing import fold, smoothing_factors
from crt_export.quantize.text import check_is_text
from crt_export.quantize.w8 import quantize_blocks, quantize_w8
from crt_export.quantize.w8a8 import quantize_w8a8

__all__ = [
    "PLAN_FILE",
    "ActivationStatistics",
    "CalibrationOptions",
    "LinearInput",
    "QuantizedInput",
    "QuantizedLinear",
    "QuantizedLinears",
    "W8A8Plan",
    "calibrate",
    "calibration_windows",
    "check_is_text",
    "emulate_fp16",
    "emulate_w8a8",
    "expected_matmuls",
    "fold",
    "linear_inputs",
    "linear_names",
    "plan_w8a8",
    "quantize_blocks",
    "quantize_linears",
    "quantize_w8",
    "quantize_w8a8",
    "read_plan",
    "smoothing_factors",
]
