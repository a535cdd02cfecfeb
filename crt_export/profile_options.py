"""The settings of an engine profile that only one runtime has: the ``[options]`` table."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from crt_export.errors import InputError, problem_list

_MOST_NAMES = 64


def _is_optimizer_name(value: Any) -> bool:
    """Whether a value can name a rewrite; ONNX Runtime takes the names joined by semicolons, in a short text."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{1,64}", value) is not None


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Parsing and checking that every options class shares."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        problems = self.problems()
        if problems:
            raise InputError(problem_list(type(self).__name__, problems))

    def problems(self) -> list[str]:
        """Return what is wrong with the values; empty when nothing is."""
        raise AssertionError("each options class checks its own values")

    @classmethod
    def parse(cls, table: Any) -> tuple[Self, list[str]]:
        """Read an ``[options]`` table.

        Returns:
            The options (defaults where the table cannot be used) and every problem found.
        """
        if not isinstance(table, dict):
            return cls(), [f"options must be a table, not {table!r}"]
        fields = {f.name for f in dataclasses.fields(cls)}
        problems = []
        for key in table:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                problems.append(f"unknown key 'options.{key}'" + (f" (did you mean {near[0]!r}?)" if near else ""))
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k in fields}
        unchecked = object.__new__(cls)
        for f in dataclasses.fields(cls):
            object.__setattr__(unchecked, f.name, given.get(f.name, f.default))
        problems += unchecked.problems()
        return (cls(), problems) if problems else (cls(**given), [])


@dataclass(frozen=True, kw_only=True)
class OrtOptions(_Options):
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

    LEVELS: ClassVar[tuple[str, ...]] = ("disable", "basic", "extended", "all")

    graph_optimization: str = "all"
    disabled_optimizers: tuple[str, ...] = ()
    spinning: bool = True
    huge_pages: bool = True
    mmap: bool = False

    def problems(self) -> list[str]:
        """Return what is wrong with the values; empty when nothing is."""
        found = []
        if self.graph_optimization not in self.LEVELS:
            found.append(
                f"options.graph_optimization must be one of {', '.join(self.LEVELS)}, not {self.graph_optimization!r}"
            )
        names = self.disabled_optimizers
        if not isinstance(names, tuple) or len(names) > _MOST_NAMES or not all(map(_is_optimizer_name, names)):
            given = list(names) if isinstance(names, tuple) else names
            found.append(f"options.disabled_optimizers must be a list of names, not {given!r:.200}")
        for name in ("spinning", "huge_pages", "mmap"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                found.append(f"options.{name} must be true or false, not {value!r}")
        return found


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(_Options):
    """Options of the TensorRT and TensorRT-RTX builder.

    Attributes:
        optimization_level: How long the builder searches for kernels, 0 (not) to 5 (longest).
        workspace_mib: Most scratch memory that a kernel may take, in MiB; 0 leaves the builder's own limit.
        ampere_plus: Whether the engine must also run on every GPU newer than SM 8.0 (TensorRT only).
        version_compatible: Whether later TensorRT versions may load the engine (TensorRT only).
    """

    optimization_level: int = 3
    workspace_mib: int = 0
    ampere_plus: bool = False
    version_compatible: bool = False

    def problems(self) -> list[str]:
        """Return what is wrong with the values; empty when nothing is."""
        found = []
        if type(self.optimization_level) is not int or not 0 <= self.optimization_level <= 5:
            found.append(f"options.optimization_level must be 0 to 5, not {self.optimization_level!r}")
        if type(self.workspace_mib) is not int or self.workspace_mib < 0:
            found.append(f"options.workspace_mib must be 0 or more MiB, not {self.workspace_mib!r}")
        for name in ("ampere_plus", "version_compatible"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"options.{name} must be true or false, not {getattr(self, name)!r}")
        return found


OPTIONS_OF_RUNTIME: dict[str, type[OrtOptions] | type[TensorRTOptions]] = {
    "onnxruntime": OrtOptions,
    "tensorrt": TensorRTOptions,
    "tensorrt-rtx": TensorRTOptions,
}
