"""The performance targets, one line each: what was measured, what it is held to, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crt_export.models.declaration import Carried

HOLDS, FALLS_SHORT, REPORTED, NOT_JUDGED = "holds", "falls short", "reported", "not judged"
FP32, INT8 = "ort-cpu-fp32", "ort-cpu-int8"
OVER_FLOOR = {FP32: 1.25, INT8: 1.35}
FASTER = {"pytorch-eager": 5.0, "pytorch-dynamic-int8": 1.4}
OVERHEAD = 0.05
FIRST_TOKEN_S = 2.0
MEMORY_STEP, MEMORY_PREFILL = 1.3, 1.6
#: Prompts are short beside what they cost on a busy machine, so a default that is as fast may look a little slower.
DEFAULT_OVER_EXACT = 1.1
TRAINED_SPEEDUP = 2.0
#: No slower, within what rounds of two processes differ by.
CPP_OVER_PYTHON = 1.02


@dataclass(frozen=True, kw_only=True)
class Line:
    """One target.

    Attributes:
        size: Model that was measured.
        figure: What was measured.
        value: None where it was not.
        limit: None for what is reported only.
        at_most: The value has to be at most the limit; otherwise at least.
        reason: Why there is no value, or what has to be known of it.
    """

    size: str
    figure: str
    value: float | None
    limit: float | None = None
    at_most: bool = True
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is met."""
        if self.value is None:
            return NOT_JUDGED
        if self.limit is None:
            return REPORTED
        return HOLDS if (self.value <= self.limit if self.at_most else self.value >= self.limit) else FALLS_SHORT

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the verdict included."""
        return {**asdict(self), "verdict": self.verdict}

    def text(self) -> str:
        """For a terminal."""
        value = "–" if self.value is None else f"{self.value:.3g}"
        limit = "" if self.limit is None else f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        reason = f"  ({self.reason})" if self.reason else ""
        return f"{self.size:9} {self.figure:52} {value:>8}  {limit:13} {self.verdict}{reason}"


def step_lines(size: str, document: Mapping[str, Any], carried: Carried, capacity: int) -> Iterator[Line]:
    """Steps, load and memory of a run of the int8 target against the fp32 one.

    Args:
        size: Model that was measured.
        document: The benchmark.
        carried: What its model carries.
        capacity: Tokens that a session's caches may hold.
    """
    everybody = {who["name"]: who for who in document["candidates"]}
    rates = document["bandwidth"]["read_gb_s"]
    for target, limit in OVER_FLOOR.items():
        step = everybody[target]["step"][0]
        reason = (
            f"{step['p50_ms']:.2f} ms; read rate p50 {rates['p50']:.1f}, p90 {rates['p90']:.1f} GB/s; "
            f"{step['over_floor_paired']:.2f} of the floor at p50"
        )
        figure = f"{target}: step / bandwidth floor"
        yield Line(size=size, figure=figure, value=step["over_floor"], limit=limit, reason=reason)
        overhead = step["runtime_overhead"]
        yield Line(size=size, figure=f"{target}: Python's share of a step", value=overhead, limit=OVERHEAD)
    load = everybody[INT8]["load"]
    cached = load["cached_share"]
    reason = "" if cached is None else f"{cached:.0%} of the weights in the page cache before"
    first = load["first_token_s"]
    yield Line(size=size, figure=f"{INT8}: open to first token, s", value=first, limit=FIRST_TOKEN_S, reason=reason)
    for target in OVER_FLOOR:
        yield from memory_lines(size, target, everybody[target]["memory"], carried, capacity)


def pytorch_lines(size: str, document: Mapping[str, Any]) -> Iterator[Line]:
    """How many times faster than PyTorch the int8 target is, from a run against ``FASTER``."""
    for name, limit in FASTER.items():
        yield _ratio_line(size, f"{INT8}: times faster than {name}", document, name, limit)


def _ratio_line(size: str, figure: str, document: Mapping[str, Any], name: str, limit: float) -> Line:
    """How many times faster the target's step is, with the interval."""
    found = [ratio for ratio in document["ratios"] if ratio["against"] == name and ratio["what"] == "step"]
    if not found:
        absent = next((who["reason"] for who in document["candidates"] if who["name"] == name), "not measured")
        return Line(size=size, figure=figure, value=None, limit=limit, at_most=False, reason=absent.splitlines()[0])
    ratio = found[0]
    reason = f"95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}"
    return Line(size=size, figure=figure, value=ratio["ratio"], limit=limit, at_most=False, reason=reason)


def memory_lines(size: str, target: str, memory: Mapping[str, Any], carried: Carried, capacity: int) -> Iterator[Line]:
    """What the bundle added to the process over its weight file, and a second session over its caches."""
    for when, limit, kinds in (
        ("steps alone", MEMORY_STEP, ("pss_step", "anonymous_step")),
        ("with prefill", MEMORY_PREFILL, ("pss", "anonymous")),
    ):
        for kind in kinds:
            name = kind.removesuffix("_step")
            before, after, file = memory[f"{name}_before"], memory[kind], memory["weight_file"]
            share = None if None in (before, after, file) else (after - before) / file
            figure = f"{target}: {name} / weight file, {when}"
            yield Line(size=size, figure=figure, value=share, limit=limit)
    caches = sum(spec.width for spec in carried.caches) * capacity * 4
    second = memory["second_session"]
    share = None if second is None else second / caches
    yield Line(size=size, figure=f"{target}: second session / its caches", value=share, limit=1.0)


def prefill_lines(size: str, target: str, document: Mapping[str, Any]) -> Iterator[Line]:
    """The bundle's own way against token by token, and how many passes would cost as much as the latter."""
    prompts: Sequence[Mapping[str, Any]] = document["candidates"][0]["prefill"]
    seconds = {(prompt["tokens"], prompt["method"]): prompt for prompt in prompts}
    for tokens in sorted({prompt["tokens"] for prompt in prompts}):
        default, exact = seconds.get((tokens, "default")), seconds.get((tokens, "exact"))
        for method in ("default", "exact", "passes", "adaptive"):
            prompt = seconds.get((tokens, method))
            if prompt is not None:
                words = f", K = {prompt['passes']}" if method == "passes" else ""
                figure = f"{target}: {tokens} tokens, {method}{words}, s"
                yield Line(size=size, figure=figure, value=prompt["p50_s"])
        if default is None or exact is None:
            continue
        figure = f"{target}: {tokens} tokens, default / token by token"
        yield Line(size=size, figure=figure, value=default["p50_s"] / exact["p50_s"], limit=DEFAULT_OVER_EXACT)
        passes = seconds.get((tokens, "passes"))
        if passes is not None and passes["passes"]:
            value = exact["p50_s"] / (passes["p50_s"] / passes["passes"])
            yield Line(size=size, figure=f"{target}: {tokens} tokens, break-even K", value=value)


def trained_line(document: Mapping[str, Any] | None, tokens: int) -> Line:
    """The default of a trained fp32 bundle against token by token, at a long prompt."""
    figure = f"{FP32}: {tokens} tokens, default, times faster than token by token"
    if document is None:
        reason = "needs --trained BUNDLE, of a trained checkpoint"
        return Line(size="trained", figure=figure, value=None, limit=TRAINED_SPEEDUP, at_most=False, reason=reason)
    prompts = {(p["tokens"], p["method"]): p["p50_s"] for p in document["candidates"][0]["prefill"]}
    value = prompts[tokens, "exact"] / prompts[tokens, "default"]
    entry = document["bundle"]["targets"][FP32]["prefill"]
    reason = "no way of its own" if entry is None else f"{entry['method']}, gap {entry['perplexity_gap']}"
    return Line(size="trained", figure=figure, value=value, limit=TRAINED_SPEEDUP, at_most=False, reason=reason)


def language_line(size: str, target: str, record: Mapping[str, Any] | None, reason: str = "") -> Line:
    """C++ against Python, from what ``step_by_language.py`` printed; None where it did not run, for a reason."""
    value = None
    if record is not None:
        found = next(entry for entry in record["targets"] if entry["target"] == target)["cpp_over_python"]
        value, reason = found["p50"], f"quartiles of the rounds {found['p25']:.3f} to {found['p75']:.3f}"
    return Line(
        size=size, figure=f"{target}: step in C++ / in Python", value=value, limit=CPP_OVER_PYTHON, reason=reason
    )
