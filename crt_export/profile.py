"""Engine profiles: where a graph runs, how precisely, and for which shapes.

A profile is one TOML file: a tracked one of ``engines/`` (``--target ort-cpu-fp32``) or a user's own
(``--target my-gpu.toml``). ``engines/README.md`` explains the keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from crt_export import catalog
from crt_export.bundle.paths import name_problem
from crt_export.checked import Checked, Rule, Rules, choice, plain_int, plain_text, shown, whole
from crt_export.errors import InputError, problem_list
from crt_export.profile_options import OrtOptions, TensorRTOptions
from crt_export.user_files import read_input

#: A profile has a few kilobytes.
_MOST_BYTES = 2**20

PRECISIONS = ("fp32", "fp16", "w8", "w8a8")
#: More threads than any machine this runs on; a number from a bundle must not be able to exhaust one.
MOST_THREADS = 1024

# Which precisions a runtime can execute. MatMulNBits (w8) is an ONNX Runtime CPU operator; TensorRT compiles
# strongly typed FP16 graphs, with or without Q/DQ, and has no fused FP32 attention kernel.
_PRECISIONS_OF = {
    ("onnxruntime", "cpu"): PRECISIONS,
    ("onnxruntime", "cuda"): ("fp32", "fp16"),
    ("tensorrt", "cuda"): ("fp16", "w8a8"),
    ("tensorrt-rtx", "cuda"): ("fp16", "w8a8"),
}
# SM versions that the builder accepts as a target.
_CAPABILITIES_OF = {
    "tensorrt": (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121),
    "tensorrt-rtx": (75, 80, 86, 89, 120, 121),
}


def cache_dtype(precision: str) -> str:
    """The dtype of the KV cache: float32 for the CPU precisions, float16 for the others."""
    return "float16" if precision in {"fp16", "w8a8"} else "float32"


class DimRange(NamedTuple):
    """The sizes one dynamic dimension may take: smallest, the one to tune for, largest."""

    min: int
    opt: int
    max: int


_OPTIONS_OF: dict[str, type[OrtOptions] | type[TensorRTOptions]] = {
    "onnxruntime": OrtOptions,
    "tensorrt": TensorRTOptions,
    "tensorrt-rtx": TensorRTOptions,
}


def _dim_range(value: Any) -> DimRange | None:
    given = value if isinstance(value, list | tuple) else ()
    sizes = [size for size in map(plain_int, given) if size is not None]
    return DimRange(*sizes) if len(sizes) == len(given) == 3 else None


_RANGE = Rule(_dim_range, "[min, opt, max], each at least 1", lambda sizes: min(sizes) >= 1)


@dataclass(frozen=True, kw_only=True)
class EngineProfile(Checked):
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
            residual is small), or ``auto``, which the build resolves (:mod:`crt_export.stages.prefill`).
        attention: ``auto``, ``fused`` (one Attention node) or ``decomposed`` (MatMul, Softmax, MatMul).
        threads: CPU threads of a session, 0 for all; always 0 on a GPU.
        options: Settings that only this runtime has.
    """

    RULES: ClassVar[Rules] = {
        "name": Rule(
            plain_text,
            "lower-case letters, digits, '.', '_' or '-' (at most 64)",
            lambda value: re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", value) is not None,
        ),
        "title": Rule(
            plain_text,
            "one line of text that names the hardware",
            lambda value: bool(value.strip()) and "\n" not in value,
        ),
        "runtime": choice(*_OPTIONS_OF),
        "device": choice("cpu", "cuda"),
        "precision": choice(*PRECISIONS),
        "capacity": whole("at least 1 token", least=1),
        "batch": _RANGE,
        "seq": _RANGE,
        "residual_dtype": choice("float16", "float32"),
        "unroll": whole("at least 1 pass", least=1, optional=True),
        "prefill": choice("auto", "steps", "passes", "adaptive"),
        "attention": choice("auto", "fused", "decomposed"),
        "threads": whole(f"0 (all) or more, at most {MOST_THREADS}", least=0, most=MOST_THREADS),
    }

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

    def heading(self) -> str:
        """What an error calls this one."""
        return f"engine profile {self.name!r}"

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong between values that are right on their own."""
        yield from _name_conflicts(values.get("name"))
        for key in ("batch", "seq"):
            if key in values and list(values[key]) != sorted(values[key]):
                yield f"{key} must rise from min over opt to max, found {list(values[key])}"
        capacity, seq = values.get("capacity"), values.get("seq")
        if capacity is not None and seq is not None and max(seq) > capacity:
            yield f"seq may not exceed the capacity of {capacity} tokens, but its largest size is {max(seq)}"
        yield from _precision_conflicts(values)
        yield from _device_conflicts(values)
        if "runtime" in values:
            yield from _runtime_conflicts(values["runtime"], values)

    @property
    def compiled(self) -> bool:
        """Whether an engine file is compiled ahead of time (TensorRT and TensorRT-RTX)."""
        return self.runtime != "onnxruntime"

    @property
    def ampere_plus(self) -> bool:
        """Whether the engine must also run on GPUs newer than SM 8.0, and may be built on one."""
        return isinstance(self.options, TensorRTOptions) and self.options.ampere_plus

    @property
    def version_compatible(self) -> bool:
        """Whether later versions of TensorRT may load the engine."""
        return isinstance(self.options, TensorRTOptions) and self.options.version_compatible

    @property
    def cache_dtype(self) -> str:
        """The dtype of the KV cache."""
        return cache_dtype(self.precision)

    def one_graph(self, iterated: bool) -> str | None:
        """The graph that a session on a CPU loads for steps and prefill alike; None where each has its own."""
        return ("prefill_pass" if iterated else "prefill") if self.device == "cpu" else None

    def graph_roles(self, graph: str, iterated: bool) -> tuple[str, ...]:
        """Who opens one of this target's ONNX files, of :data:`crt_export.bundle.schema.GRAPH_ROLES`.

        Args:
            graph: Its name.
            iterated: Whether the model is.
        """
        if graph == "head":
            return ("validation",)
        interchange = ("interchange",) if graph in ("step", "prefill") else ()
        if self.compiled:
            return ("compiler", *interchange) if interchange else ("validation",)
        return ("session", *interchange) if self.one_graph(iterated) in (None, graph) else interchange

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
        fields = [f.name for f in dataclasses.fields(cls)]
        required = ("name", "title", "runtime", "device", "precision", "capacity", "batch", "seq")
        problems = cls.unknown_keys(values)
        problems += [f"missing key {key!r}" for key in required if key not in values]
        given = {key: value for key, value in values.items() if key in fields}
        given.setdefault("compute_capability", None)
        given.setdefault("residual_dtype", "float16" if given.get("precision") in ("fp16", "w8a8") else "float32")
        given["options"], option_problems = _options_from_table(given.get("options", {}), given.get("runtime"))
        problems += cls.judge(given)[1] + option_problems
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


def _options_from_table(table: Any, runtime: Any) -> tuple[OrtOptions | TensorRTOptions, list[str]]:
    """The options of a profile, defaults where the table cannot be used, and every problem found."""
    kind = _OPTIONS_OF.get(runtime, OrtOptions) if isinstance(runtime, str) else OrtOptions
    if not isinstance(table, dict):
        return kind(), [f"options must be a table, found {shown(table)}"]
    unknown = kind.unknown_keys(table)
    _, problems = kind.judge({key: value for key, value in table.items() if key in kind.RULES})
    return (kind(), unknown + problems) if unknown + problems else (kind(**table), [])


def _name_conflicts(name: str | None) -> Iterator[str]:
    problem = None if name is None else name_problem(name)
    if problem is not None:
        yield f"name {name!r} {problem}: files of the bundle are named after it"
    if name in PRECISIONS:
        yield f"name {name!r} is the name of a precision: graph files of the two would collide"


def _precision_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    runtime, device, precision = (values.get(key) for key in ("runtime", "device", "precision"))
    if runtime is not None and device is not None:
        allowed = _PRECISIONS_OF.get((runtime, device))
        if allowed is None:
            yield f"{runtime} does not run on {device}"
        elif precision is not None and precision not in allowed:
            yield f"{runtime} on {device} runs {', '.join(allowed)}, not {precision}"
    if precision in ("fp32", "w8") and values.get("residual_dtype", "float32") != "float32":
        yield f"residual_dtype must be float32 with precision {precision}"


def _device_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("device") == "cuda":
        if values.get("threads"):
            yield "threads is for device cpu"
        if values.get("prefill") == "adaptive":
            yield "prefill = 'adaptive' is for device cpu, where a look at the residual between passes costs nothing"


def _runtime_conflicts(runtime: str, values: Mapping[str, Any]) -> Iterator[str]:
    if runtime == "onnxruntime" and values.get("attention", "auto") != "auto":
        yield "attention is for TensorRT: ONNX Runtime runs the exported graph as it is"
    capability, capabilities = values.get("compute_capability"), _CAPABILITIES_OF.get(runtime)
    if "compute_capability" in values and capabilities is None and capability is not None:
        yield f"compute_capability is for TensorRT, not for {runtime}"
    if "compute_capability" in values and capabilities is not None and plain_int(capability) not in capabilities:
        listed = ", ".join(map(str, capabilities))
        yield (
            f"compute_capability of a {runtime} profile must be one of {listed} (80 is SM 8.0), found "
            f"{shown(capability)}"
        )
    options, expected = values.get("options"), _OPTIONS_OF[runtime]
    if options is not None and not isinstance(options, expected):
        yield f"options of a {runtime} profile must be {expected.__name__}, found {type(options).__name__}"
    elif runtime == "tensorrt-rtx":
        for name in ("ampere_plus", "version_compatible"):
            if getattr(options, name, False):
                yield f"options.{name} does not apply to tensorrt-rtx"
