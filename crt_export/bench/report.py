"""The report of one benchmark run, as frozen records and as JSON (``crt-export-bench``, format version 1).

Units are in the names: ``_s`` seconds, ``_ms`` milliseconds, ``_gb_s`` 1e9 bytes per second, ``_gflop_s`` 1e9 floating
point operations per second; everything called bytes, weights, cache or memory is bytes. ``None`` (JSON null) is a
figure that this machine or candidate does not have, never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = "crt-export-bench"
FORMAT_VERSION = 1

#: What a candidate can be.
KINDS = ("target", "pytorch-eager", "pytorch-compile", "pytorch-dynamic-int8", "bundle")
#: Whether it ran.
MEASURED, NOT_RUN = "measured", "not run"


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """A sampled rate: 10th, 50th and 90th percentile, and the samples in the order they were taken."""

    p10: float
    p50: float
    p90: float
    samples: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """How fast memory was read, sampled in turns with the measurement.

    Attributes:
        threads: Threads that read.
        bytes: Size of the array they read, far beyond the caches.
        read_gb_s: The rate.
    """

    threads: int
    bytes: int
    read_gb_s: Quantiles


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How fast float32 matrices were multiplied, sampled in the same rounds."""

    threads: int
    gflop_s: Quantiles


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The model that was measured.

    Attributes:
        name: The folder's name.
        model_type: Its architecture, such as ``context_ready_transformer``.
        hidden_size: Width of the residual stream.
        caches: Number of caches of keys and values, one for each layer that attends.
        vocab_size: Number of tokens.
        parameters: Number of weights, a tied head counted once; None where the manifest does not say.
    """

    name: str
    model_type: str
    hidden_size: int
    caches: int
    vocab_size: int
    parameters: int | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """From a fresh process to the first token.

    Attributes:
        open_s: Opening: hashes checked, graphs loaded, a session allocated; imports excluded.
        first_token_s: Opening and one step, the first logits at hand.
        import_s: Importing the package and its runtime before that.
        cached_share: Share of the weight file's pages that were in the page cache before the opening, 0 to 1; 1 is
            a warm start, which never waits for the disk. None where the system cannot tell.
    """

    open_s: float
    first_token_s: float
    import_s: float | None = None
    cached_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes that one step has to move: weights once, keys and values of the used length, states in and out, logits.

    ``total`` is their sum; the floor of a step is total / read bandwidth.
    """

    weights: int
    cache: int
    states: int
    logits: int
    total: int


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One token for each row of a batch, at one position.

    Attributes:
        position: Tokens in the cache before the first measured step; every block starts there again.
        batch: Rows.
        samples: Steps that were timed, warm-ups excluded.
        p10_ms: 10th percentile, and likewise the others.
        tokens_per_s: Rows per mean step.
        runtime_overhead: Median share of a step spent outside the engine's run call, 0 to 1.
        bytes: What a step has to move; None where the weights of a candidate are unknown.
        flops: Floating point operations of a step, two for each multiply-add.
        floor_ms: bytes.total / 90th percentile of the read bandwidth.
        compute_floor_ms: flops / 90th percentile of the compute rate.
        over_floor: p50_ms / floor_ms.
        over_floor_paired: p50_ms / (bytes.total / median bandwidth).
    """

    position: int
    batch: int
    samples: int
    p10_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float
    tokens_per_s: float
    runtime_overhead: float | None = None
    bytes: StepBytes | None = None
    flops: int | None = None
    floor_ms: float | None = None
    compute_floor_ms: float | None = None
    over_floor: float | None = None
    over_floor_paired: float | None = None


@dataclass(frozen=True, kw_only=True)
class PrefillFigures:
    """Time to first token: a prompt, from an empty cache to its last logits.

    Attributes:
        tokens: Length of the prompt.
        method: ``default`` (the candidate's own: what the bundle's manifest says, for PyTorch the passes that the
            model was trained for), ``passes`` (this many), ``adaptive`` or ``exact``.
        passes: Number of passes K where the method has one.
        chunk: Tokens of one call, None for the candidate's own.
        samples: Prompts that were timed.
        p50_s: Median, and likewise the 90th percentile.
    """

    tokens: int
    method: str
    passes: int | None
    chunk: int | None
    samples: int
    p50_s: float
    p90_s: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory of the candidate's own process.

    Attributes:
        weight_file: Size of the weight file it runs from.
        pss_before: Proportional set size before opening, libraries loaded: what is not the bundle's.
        anonymous_before: Likewise the anonymous (private, not file-backed) bytes.
        pss_step: After steps alone.
        anonymous_step: Likewise.
        pss: After steps and prefill.
        anonymous: Likewise.
        peak_rss: Largest resident set of the whole process so far.
        second_session: What opening and stepping a second session of the same bundle added to pss.
        device: Memory of the GPU in use, None on a CPU.
    """

    weight_file: int | None = None
    pss_before: int | None = None
    anonymous_before: int | None = None
    pss_step: int | None = None
    anonymous_step: int | None = None
    pss: int | None = None
    anonymous: int | None = None
    peak_rss: int | None = None
    second_session: int | None = None
    device: int | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the things that were measured in turns.

    Attributes:
        name: Unique in the report.
        kind: One of ``KINDS``.
        status: ``measured`` or ``not run``.
        reason: Why it did not run; empty where it did.
        model: Its model where that is not the report's.
        load: From process to first token, None where it did not get there.
        step: One entry a position.
        prefill: One entry a prompt length and method.
        memory: Its process's memory.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    model: ModelSize | None = None
    load: Load | None = None
    step: tuple[StepFigures, ...] = ()
    prefill: tuple[PrefillFigures, ...] = ()
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times longer ``against`` took than ``of``, measured pair by pair: above 1 ``of`` is the faster one.

    Attributes:
        of: Name of the candidate that is judged.
        against: Name of the one it is compared with.
        what: ``step`` or ``prefill``.
        at: Position of the step, or tokens of the prompt.
        ratio: Median over rounds of (median of ``against``) / (median of ``of``) within a round.
        low: Lower end of its 95 % bootstrap interval over rounds.
        high: Upper end.
        rounds: Number of rounds, each one pair.
    """

    of: str
    against: str
    what: str
    at: int
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """One benchmark run.

    Attributes:
        created: When, ISO 8601, UTC.
        command: The command line that repeats it.
        crt_export: Version of this package.
        hardware: What the machine is.
        versions: Package to installed version.
        bundle: Name, digest of the manifest, targets, validated or not.
        model: The model of the bundle.
        options: Every option of the run, resolved.
        bandwidth: None where nothing on a CPU was measured.
        compute: Likewise.
        candidates: In the order they were measured in the first round; the target first.
        ratios: The target, and where asked others, against each of the rest.
        notes: What a reader must know, one sentence each.
    """

    created: str
    command: str
    crt_export: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    bundle: Mapping[str, Any]
    model: ModelSize
    options: Mapping[str, Any]
    bandwidth: Bandwidth | None
    compute: Compute | None
    candidates: tuple[Candidate, ...]
    ratios: tuple[Ratio, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "ratios": [_ratio_dict(ratio) for ratio in self.ratios],
        }
        return _lists(values)

    def candidate(self, name: str) -> Candidate:
        """The candidate of this name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)


def _ratio_dict(ratio: Ratio) -> dict[str, Any]:
    values = asdict(ratio)
    at = values.pop("at")
    return {**values, "position" if ratio.what == "step" else "tokens": at}


def _lists(value: Any) -> Any:
    """The same with lists in place of tuples, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
