"""Parity: every target as it is deployed against PyTorch FP32, on held-out text.

Reports are read where torch is not installed, so the names below are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crt_export.parity.check import check_parity, validate_bundle
    from crt_export.parity.report import Comparison, ParityReport
    from crt_export.parity.setup import ParityCase
    from crt_export.parity.tolerances import Tolerance, Tolerances, load_tolerances
    from crt_export.parity.windows import ParityOptions

__all__ = [
    "Comparison",
    "ParityCase",
    "ParityOptions",
    "ParityReport",
    "Tolerance",
    "Tolerances",
    "check_parity",
    "load_tolerances",
    "validate_bundle",
]
_MODULES = {
    "Comparison": "report",
    "ParityCase": "setup",
    "ParityOptions": "windows",
    "ParityReport": "report",
    "Tolerance": "tolerances",
    "Tolerances": "tolerances",
    "check_parity": "check",
    "load_tolerances": "tolerances",
    "validate_bundle": "check",
}


def __getattr__(name: str) -> object:
    """Import what is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
