"""What makes an engine profile impossible: each rule judges the values that are there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from crt_export.bundle.paths import name_problem
from crt_export.profile_options import OPTIONS_OF_RUNTIME, TensorRTOptions

PRECISIONS = ("fp32", "fp16", "w8", "w8a8")
DEVICES = ("cpu", "cuda")
ATTENTION_FORMS = ("auto", "fused", "decomposed")
#: More threads than any machine this runs on; a number from a bundle must not be able to exhaust one.
MOST_THREADS = 1024
RESIDUAL_DTYPES = ("float16", "float32")
#: How prompts are taken; ``auto`` leaves the choice to the build.
PREFILL_METHODS = ("auto", "steps", "passes", "adaptive")

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


def profile_problems(values: Mapping[str, Any]) -> list[str]:
    """Return every problem among the given fields of an EngineProfile; absent fields are not judged."""
    return [
        *_text_problems(values),
        *_choice_problems(values),
        *_size_problems(values),
        *_runtime_problems(values),
    ]


def _text_problems(values: Mapping[str, Any]) -> list[str]:
    found = []
    name = values.get("name", "unnamed")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        found.append(f"name must be lower-case letters, digits, '.', '_' or '-' (at most 64), not {name!r}")
    elif (problem := name_problem(name)) is not None:
        found.append(f"name {name!r} {problem}: files of the bundle are named after it")
    elif name in PRECISIONS:
        found.append(f"name {name!r} is the name of a precision: graph files of the two would collide")
    title = values.get("title", "untitled")
    if not isinstance(title, str) or not title.strip() or "\n" in title:
        found.append(f"title must be one line of text that names the hardware, not {title!r}")
    return found


def _choice_problems(values: Mapping[str, Any]) -> list[str]:
    choices = {
        "runtime": tuple(OPTIONS_OF_RUNTIME),
        "device": DEVICES,
        "precision": PRECISIONS,
        "attention": ATTENTION_FORMS,
        "residual_dtype": RESIDUAL_DTYPES,
        "prefill": PREFILL_METHODS,
    }
    return [
        f"{key} must be one of {', '.join(allowed)}, not {values[key]!r}"
        for key, allowed in choices.items()
        if key in values and values[key] not in allowed
    ]


def _is_count(value: Any, least: int) -> bool:
    """Whether a value is an int of at least ``least`` (true and false are not)."""
    return type(value) is int and value >= least


def _size_problems(values: Mapping[str, Any]) -> list[str]:
    found = []
    capacity = values.get("capacity", 1)
    if not _is_count(capacity, 1):
        found.append(f"capacity must be at least 1 token, not {capacity!r}")
    threads = values.get("threads", 0)
    if not _is_count(threads, 0) or threads > MOST_THREADS:
        found.append(f"threads must be 0 (all) or more, at most {MOST_THREADS}, not {threads!r}")
    unroll = values.get("unroll")
    if unroll is not None and not _is_count(unroll, 1):
        found.append(f"unroll must be at least 1 pass, not {unroll!r}")
    for key in ("batch", "seq"):
        if key in values:
            found += _range_problems(key, values[key])
    seq = values.get("seq")
    if not found and isinstance(seq, tuple) and "capacity" in values and seq[2] > capacity:
        found.append(f"seq may not exceed the capacity of {capacity} tokens, but its largest size is {seq[2]}")
    return found


def _range_problems(key: str, value: Any) -> list[str]:
    if not isinstance(value, tuple) or len(value) != 3 or not all(_is_count(size, 1) for size in value):
        found = list(value) if isinstance(value, tuple) else value
        return [f"{key} must be [min, opt, max], each at least 1, not {found!r}"]
    if not value[0] <= value[1] <= value[2]:
        return [f"{key} must rise from min over opt to max, not {list(value)}"]
    return []


def _runtime_problems(values: Mapping[str, Any]) -> list[str]:
    """Rules between fields; each is judged only where its fields are valid on their own."""
    runtime, device, precision = values.get("runtime"), values.get("device"), values.get("precision")
    found = []
    known = _is_runtime(runtime) and device in DEVICES
    allowed = _PRECISIONS_OF.get((str(runtime), str(device)))
    if known and allowed is None:
        found.append(f"{runtime} does not run on {device}")
    elif allowed is not None and precision in PRECISIONS and precision not in allowed:
        found.append(f"{runtime} on {device} runs {', '.join(allowed)}, not {precision}")
    if precision in ("fp32", "w8") and values.get("residual_dtype", "float32") != "float32":
        found.append(f"residual_dtype must be float32 with precision {precision}")
    if runtime == "onnxruntime" and values.get("attention", "auto") in ("fused", "decomposed"):
        found.append("attention is for TensorRT: ONNX Runtime runs the exported graph as it is")
    if device == "cuda" and values.get("threads", 0) not in (0, None):
        found.append("threads is for device cpu")
    if device == "cuda" and values.get("prefill") == "adaptive":
        found.append(
            "prefill = 'adaptive' is for device cpu, where a look at the residual between passes costs nothing"
        )
    found += _capability_problems(runtime, values.get("compute_capability"), "compute_capability" in values)
    return found + _option_problems(runtime, values.get("options"))


def _is_runtime(value: Any) -> bool:
    """Whether a value, which a bundle may have made anything at all, names a runtime."""
    return isinstance(value, str) and value in OPTIONS_OF_RUNTIME


def _capability_problems(runtime: Any, capability: Any, present: bool) -> list[str]:
    targets = _CAPABILITIES_OF.get(str(runtime))
    if not present or not _is_runtime(runtime):
        return []
    if targets is None:
        return [] if capability is None else [f"compute_capability is for TensorRT, not for {runtime}"]
    if type(capability) is int and capability in targets:
        return []
    listed = ", ".join(map(str, targets))
    return [f"compute_capability of a {runtime} profile must be one of {listed} (80 is SM 8.0), not {capability!r}"]


def _option_problems(runtime: Any, options: Any) -> list[str]:
    expected = OPTIONS_OF_RUNTIME.get(str(runtime))
    if expected is None or options is None:
        return []
    if not isinstance(options, expected):
        return [f"options of a {runtime} profile must be {expected.__name__}, not {type(options).__name__}"]
    if runtime == "tensorrt-rtx" and isinstance(options, TensorRTOptions):
        return [
            f"options.{name} does not apply to tensorrt-rtx"
            for name in ("ampere_plus", "version_compatible")
            if getattr(options, name)
        ]
    return []
