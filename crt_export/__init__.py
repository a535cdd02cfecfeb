"""Export a trained context-ready transformer (CRT) from PyTorch to a verified deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crt_export.runtime import Bundle, Session, load_bundle

__version__ = "0.1.0"
__all__ = ["Bundle", "Session", "__version__", "load_bundle"]


def __getattr__(name: str) -> object:
    """Import the runtime on first use, so that ``import crt_export`` stays cheap."""
    if name in {"Bundle", "Session", "load_bundle"}:
        from crt_export import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
