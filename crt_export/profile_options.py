"""Options of an engine profile that only one runtime has: the ``[options]`` table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from crt_export.checked import FLAG, Checked, Rule, Rules, choice, whole

_MOST_NAMES = 64


def _is_optimizer_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{1,64}", value) is not None


@dataclass(frozen=True, kw_only=True)
class OrtOptions(Checked):
    """Options of an ONNX Runtime session.

    Attributes:
        graph_optimization: Highest level of graph rewriting: ``disable``, ``basic``, ``extended`` or ``all``.
        disabled_optimizers: Names of single rewrites to leave out, such as ``MatMulAddFusion``.
        spinning: Whether idle threads spin between calls: fastest for a lone session, harmful for several
            (two spinning sessions in one thread took 22.6 ms instead of 12.1).
        huge_pages: Whether a CPU's weights are moved into huge pages as they are loaded, where Linux has them to
            give: steps take 5 to 8 % less time for 5 ms of loading per 2 MiB.
        mmap: Whether weights that ONNX Runtime does not pack, such as the embedding table, may stay mapped from the
            bundle's file: processes then share them, but who overwrites the file in place changes what open sessions
            compute, and who truncates it ends the process.
    """

    HEADING: ClassVar[str] = "OrtOptions"
    PREFIX: ClassVar[str] = "options."
    # ONNX Runtime takes the names joined by semicolons, in a short text.
    RULES: ClassVar[Rules] = {
        "graph_optimization": choice("disable", "basic", "extended", "all"),
        "disabled_optimizers": Rule(
            lambda value: tuple(value) if isinstance(value, list | tuple) else None,
            "a list of names",
            lambda names: len(names) <= _MOST_NAMES and all(map(_is_optimizer_name, names)),
        ),
        "spinning": FLAG,
        "huge_pages": FLAG,
        "mmap": FLAG,
    }

    graph_optimization: str = "all"
    disabled_optimizers: tuple[str, ...] = ()
    spinning: bool = True
    huge_pages: bool = True
    mmap: bool = False


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(Checked):
    """Options of the TensorRT and TensorRT-RTX builder.

    Attributes:
        optimization_level: How long the builder searches for kernels, 0 (not) to 5 (longest).
        workspace_mib: Most scratch memory that a kernel may take, in MiB; 0 leaves the builder's own limit.
        ampere_plus: Whether the engine must also run on every GPU newer than SM 8.0 (TensorRT only).
        version_compatible: Whether later TensorRT versions may load the engine (TensorRT only).
    """

    HEADING: ClassVar[str] = "TensorRTOptions"
    PREFIX: ClassVar[str] = "options."
    RULES: ClassVar[Rules] = {
        "optimization_level": whole("0 to 5", least=0, most=5),
        "workspace_mib": whole("0 or more MiB", least=0),
        "ampere_plus": FLAG,
        "version_compatible": FLAG,
    }

    optimization_level: int = 3
    workspace_mib: int = 0
    ampere_plus: bool = False
    version_compatible: bool = False
