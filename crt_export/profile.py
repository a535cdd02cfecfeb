"""Engine profiles: where a graph runs, how precisely, and for which shapes.

A profile is one TOML file: a tracked one of ``engines/`` (``--target ort-cpu-fp32``) or a user's own
(``--target my-gpu.toml``). ``engines/README.md`` explains the keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from crt_export import catalog
from crt_export.errors import InputError, problem_list
from crt_export.input_file import read_input
from crt_export.profile_check import profile_problems
from crt_export.profile_options import OPTIONS_OF_RUNTIME, OrtOptions, TensorRTOptions

#: A profile has a few kilobytes.
_MOST_BYTES = 2**20


class DimRange(NamedTuple):
    """The sizes one dynamic dimension may take: smallest, the one to tune for, largest."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """One target that a bundle can be built for.

    Attributes:
        name: Target name, part of file names: lower-case letters, digits, ``.``, ``_`` and ``-``.
        title: One line for people; names the hardware.
        runtime: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        device: ``cpu`` or ``cuda``, where the engine runs.
        precision: ``fp32``, ``fp16``, ``w8`` (weight-only INT8) or ``w8a8`` (static INT8).
        compute_capability: NVIDIA SM version times ten (80 is SM 8.0) to compile for; None for ONNX Runtime.
        capacity: Default number of tokens that the KV cache holds; fixed in TensorRT engines.
        batch: Sequences per call.
        seq: Tokens per prefill call; longer prompts go in chunks of ``seq.max``.
        residual_dtype: Of the residual stream: ``float16`` or ``float32``; always float32 for fp32 and w8.
        unroll: Passes of the unrolled prefill; None takes the checkpoint's ``unroll_steps``.
        prefill: How prompts are taken: ``steps`` (token by token), ``passes``, ``adaptive`` (passes until their
            residual is small), or ``auto``, which the build resolves (:mod:`crt_export.build.prefill`).
        attention: ``auto``, ``fused`` (one Attention node) or ``decomposed`` (MatMul, Softmax, MatMul).
        threads: CPU threads of a session, 0 for all; always 0 on a GPU.
        options: Settings that only this runtime has.

    Raises:
        InputError: A value is impossible, or two values exclude each other; lists every problem.
    """

    name: str
    title: str
    runtime: str
    device: str
    precision: str
    compute_capability: int | None
    capacity: int
    batch: DimRange
    seq: DimRange
    residual_dtype: str
    unroll: int | None = None
    prefill: str = "auto"
    attention: str = "auto"
    threads: int = 0
    options: OrtOptions | TensorRTOptions = field(default_factory=OrtOptions)

    def __post_init__(self) -> None:
        """Refuse impossible profiles, whatever way they were made."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        problems = profile_problems(values)
        if problems:
            raise InputError(problem_list(f"engine profile {self.name!r}", problems))

    @property
    def compiled(self) -> bool:
        """Whether an engine file is compiled ahead of time (TensorRT and TensorRT-RTX)."""
        return self.runtime != "onnxruntime"

    @property
    def cache_dtype(self) -> str:
        """The dtype of the KV cache: float32 for the CPU precisions, float16 for the others."""
        return "float16" if self.precision in {"fp16", "w8a8"} else "float32"

    def with_capacity(self, capacity: int) -> EngineProfile:
        """Return this profile for another cache capacity; ``seq`` shrinks where it would not fit."""
        seq = DimRange(*(max(1, min(size, capacity)) for size in self.seq))
        return dataclasses.replace(self, capacity=capacity, seq=seq)

    def with_unroll(self, unroll: int) -> EngineProfile:
        """Return this profile with a fixed number of prefill passes."""
        return dataclasses.replace(self, unroll=unroll)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON-ready values; :meth:`from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {
            **values,
            "batch": list(self.batch),
            "seq": list(self.seq),
            "options": {key: list(v) if isinstance(v, tuple) else v for key, v in values["options"].items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "manifest") -> EngineProfile:
        """Make a profile from TOML or JSON values.

        Args:
            values: The keys of the class; ``options`` is a table.
            source: What to call the origin in an error message.

        Raises:
            InputError: Unknown or missing keys and impossible values, all in one message.
        """
        problems = _key_problems(values)
        known = {f.name for f in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        precision = given.get("precision")
        given.setdefault("compute_capability", None)
        given.setdefault("residual_dtype", "float16" if precision in ("fp16", "w8a8") else "float32")
        given = {key: _range_from_list(value) if key in ("batch", "seq") else value for key, value in given.items()}
        options_class = OPTIONS_OF_RUNTIME.get(str(given.get("runtime")), OrtOptions)
        options, option_problems = options_class.parse(given.get("options", {}))
        given["options"] = options
        problems += profile_problems(given) + option_problems
        if problems:
            raise InputError(problem_list(f"engine profile {source}", problems))
        return cls(**given)


def load_profile(name_or_path: str | Path) -> EngineProfile:
    """Load a tracked profile by name, or a user's own from a ``.toml`` file.

    Raises:
        InputError: The name is unknown (the message lists the known ones), or the file is missing, not
            TOML, or holds an impossible profile.
    """
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        return _profile_from_file(Path(name_or_path))
    paths = {_stem(path): path for path in catalog.definitions("engines")}
    if name_or_path in paths:
        return _profile_from_file(paths[name_or_path])
    near = difflib.get_close_matches(name_or_path, paths, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"unknown target {name_or_path!r}{hint}\n"
        f"known targets: {', '.join(paths)}; a profile of your own is given as a path that ends in .toml"
    )


def list_profiles() -> list[EngineProfile]:
    """Return every tracked profile, sorted by name."""
    return [_profile_from_file(path) for path in catalog.definitions("engines")]


def _stem(path: Traversable) -> str:
    return path.name.removesuffix(".toml")


def _profile_from_file(path: Traversable) -> EngineProfile:
    """Parse one TOML file; a missing ``name`` is the file's stem."""
    try:
        text = read_input(path, most=_MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"engine profile {path} cannot be read: {error}") from error
    except OSError as error:
        raise InputError(f"engine profile {path} cannot be read: {error.strerror}") from error
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of too many digits and deep nesting are no TOMLDecodeError
        raise InputError(f"engine profile {path} is not valid TOML: {error}") from error
    return EngineProfile.from_dict({"name": _stem(path), **values}, source=str(path))


def _key_problems(values: Mapping[str, Any]) -> list[str]:
    """Name unknown keys (with the nearest known one) and missing keys."""
    fields = {f.name: f for f in dataclasses.fields(EngineProfile)}
    problems = []
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problems.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    required = ("name", "title", "runtime", "device", "precision", "capacity", "batch", "seq")
    return problems + [f"missing key {key!r}" for key in required if key not in values]


def _range_from_list(value: Any) -> Any:
    """Turn ``[min, opt, max]`` into a DimRange; leave anything else for the check to refuse."""
    return DimRange(*value) if isinstance(value, list) and len(value) == 3 else value
