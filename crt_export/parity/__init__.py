"""Does the deployed form still compute the model? Every graph against PyTorch FP32 on held-out text."""

from crt_export.parity.bundle import validate_bundle
from crt_export.parity.case import ParityCase
from crt_export.parity.check import check_parity
from crt_export.parity.report import ParityReport, ParityRow
from crt_export.parity.tolerances import Tolerance, Tolerances, load_tolerances
from crt_export.parity.windows import ParityOptions

__all__ = [
    "ParityCase",
    "ParityOptions",
    "ParityReport",
    "ParityRow",
    "Tolerance",
    "Tolerances",
    "check_parity",
    "load_tolerances",
    "validate_bundle",
]
