"""Options of a benchmark run, checked against the bundle before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from crt_export.bench.report import KINDS
from crt_export.bench.runner import Passes, PromptText, prompt_text
from crt_export.bundle import BundleFiles, open_bundle
from crt_export.checked import Checked, Rules, whole
from crt_export.errors import InputError, problem_list
from crt_export.machine import machine
from crt_export.models.declaration import ModelInfo
from crt_export.profile import MOST_THREADS
from crt_export.runtime.opening import Target, model_from_manifest, target_from_manifest
from crt_export.user_files import is_folder

TARGET, BUNDLE, BASELINES = KINDS[0], KINDS[4], KINDS[1:4]
PASSES_WORDS = ("adaptive", "exact")
_DEFAULT_POSITION = 64
_DEFAULT_PROMPTS = (16, 64)
_DEFAULT_STEPS = 20
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Checked):
    """What is measured and how often.

    Attributes:
        target: The target that is judged; empty takes the first one that runs here.
        against: What runs in turns with it: a target of the bundle, one of ``BASELINES``, or another bundle's folder.
        positions: Tokens in the cache at the first measured step; empty takes one of 64 or less.
        prompt_tokens: Lengths of prompts; empty takes 16 and 64, cut to the capacity.
        passes: Ways to feed a prompt beside the candidate's own: numbers of passes, ``adaptive``, ``exact``.
        rounds: Blocks of steps of every candidate.
        prefill_rounds: Prompts of every length, candidate and method.
        steps: Steps of a block; 0 takes 20, fewer where the capacity is small.
        batch: Rows.
        text: UTF-8 file that prompts are the beginning of; None takes the package's, or random ids where the model has
            no tokenizer.
        tokens: File of token ids in its place, .npy.
        threads: CPU threads of every candidate, 0 for every core; None takes the target's profile.
        probe_bytes: Size of the array whose reading gives the bandwidth, far beyond the caches.
        pause_s: Sleep before each block, in which the threads of the one before stop spinning.

    Raises:
        InputError: A value is impossible; lists every problem.
    """

    HEADING: ClassVar[str] = "benchmark options"
    RULES: ClassVar[Rules] = {
        "rounds": whole("at least 1", least=1),
        "prefill_rounds": whole("at least 1", least=1),
        "steps": whole("at least 0", least=0),
        "batch": whole("at least 1", least=1),
        "threads": whole(f"0 to {MOST_THREADS}", least=0, most=MOST_THREADS, optional=True),
        "probe_bytes": whole(f"at least {1 << 20}", least=1 << 20),
    }

    target: str = ""
    against: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    passes: tuple[int | str, ...] = ()
    rounds: int = 10
    prefill_rounds: int = 3
    steps: int = 0
    batch: int = 1
    text: Path | None = None
    tokens: Path | None = None
    threads: int | None = None
    probe_bytes: int = 256 << 20
    pause_s: float = 0.05

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with single positions, lengths and methods."""
        yield from (f"a position must be at least 0, found {found}" for found in values["positions"] if found < 0)
        for found in values["prompt_tokens"]:
            if found < 1:
                yield f"prompt-tokens must be at least 1, found {found}"
        for found in values["passes"]:
            if found not in PASSES_WORDS if isinstance(found, str) else found < 1:
                yield f"passes must be a number of at least 1, {' or '.join(PASSES_WORDS)}, found {found!r}"


@dataclass(frozen=True, kw_only=True)
class CandidatePlan:
    """One candidate that was asked for.

    Attributes:
        name: Unique in the report.
        kind: One of ``KINDS``.
        files: Its bundle; of PyTorch that of the target.
        model: Its model.
        target: Its target; None for PyTorch.
        step: The step graph of its model; None where the bundle has none.
        request: What its worker is told.
    """

    name: str
    kind: str
    files: BundleFiles
    model: ModelInfo
    target: Target | None
    step: Path | None
    request: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A bundle, the candidates, and the options with every default resolved.

    Attributes:
        files: The bundle.
        model: Its model.
        target: The target that is judged.
        candidates: The candidates, the target first.
        threads: CPU threads, a number.
        text: Where prompts come from.
        options: What is measured; nothing in it is left to a default.
    """

    files: BundleFiles
    model: ModelInfo
    target: Target
    candidates: tuple[CandidatePlan, ...]
    threads: int
    text: PromptText
    options: BenchOptions

    @property
    def methods(self) -> tuple[Passes, ...]:
        """How prompts are fed; None is the candidate's own method and comes first."""
        return (None, *self.options.passes)


def plan_from_options(bundle: Path, options: BenchOptions) -> Plan:
    """Resolve the options for a bundle.

    Raises:
        BundleError: A bundle cannot be opened.
        InputError: Something asked for is unknown, or does not fit into the capacity; all problems listed.
        UnsupportedError: The bundle has no target that runs here, and none was named.
        MissingDependencyError: The model's tokenizer needs a library that is not installed.
    """
    files = open_bundle(bundle, allow_unvalidated=True)
    model = model_from_manifest(files)
    target = target_from_manifest(files, options.target or _default_target(files), model)
    threads = target.profile.threads if options.threads is None else options.threads
    threads = threads or int(machine()["cores"])
    steps = options.steps or max(1, min(_DEFAULT_STEPS, target.capacity // 3))
    last = target.capacity - steps
    positions = _once(options.positions) or (max(0, min(_DEFAULT_POSITION, last)),)
    prompts = _once(options.prompt_tokens or [min(size, target.capacity) for size in _DEFAULT_PROMPTS])
    problems = [
        f"position {position} and {steps} steps exceed the capacity of {target.capacity}"
        + (f": at most {last}" if last >= 0 else "")
        for position in positions
        if position > last
    ]
    problems += [
        f"{size} prompt tokens exceed the capacity of {target.capacity}" for size in prompts if size > target.capacity
    ]
    if problems:
        raise InputError(problem_list(f"{target.name} of {files.path}", problems))
    needed = options.batch * max(*positions, *prompts)
    text = prompt_text(files, model, needed, text=options.text, tokens=options.tokens)
    capacity = max(max(positions) + steps, *prompts)
    room = _Room(batch=options.batch, threads=threads, capacity=capacity, text=text.ids)
    candidates = [_target_candidate(files, target, model, room, name=target.name, kind=TARGET)]
    folders = [Path(name).name for name in options.against]
    for name, folder in zip(options.against, folders, strict=True):
        shown = name if folders.count(folder) > 1 else ""
        candidates.append(_candidate(name, files, target, model, room, shown=shown))
    names = [candidate.name for candidate in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"measured against itself, or named twice: {', '.join(twice)}")
    return Plan(
        files=files,
        model=model,
        target=target,
        candidates=tuple(candidates),
        threads=threads,
        text=text,
        options=replace(
            options,
            target=target.name,
            positions=positions,
            prompt_tokens=prompts,
            passes=_once(options.passes),
            steps=steps,
            threads=threads,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What all candidates share: rows, threads, the largest position that is reached, and what prompts say."""

    batch: int
    threads: int
    capacity: int
    text: tuple[int, ...]

    def request(self, kind: str, model: ModelInfo) -> dict[str, Any]:
        """The part of a request that is about these.

        Raises:
            InputError: The candidate's model does not know a token of the text.
        """
        if self.text and max(self.text) >= model.vocab_size:
            raise InputError(
                f"prompts hold token id {max(self.text)}, and a model that is compared has {model.vocab_size} "
                "tokens: compare models of one tokenizer, or give ids that all know with --tokens"
            )
        return {"kind": kind, "batch": self.batch, "threads": self.threads, "text": self.text}


def _candidate(
    name: str, files: BundleFiles, target: Target, model: ModelInfo, room: _Room, *, shown: str = ""
) -> CandidatePlan:
    """What ``--against`` names; a bundle is shown by its folder's name unless ``shown`` says otherwise."""
    if name in BASELINES:
        return _baseline_candidate(name, files, target, model, room)
    if name in files.manifest["targets"]:
        return _target_candidate(files, target_from_manifest(files, name, model), model, room, name=name, kind=TARGET)
    if not is_folder(name):
        known = ", ".join((*BASELINES, *files.manifest["targets"]))
        raise InputError(f"--against {name[:200]!r} is neither a bundle's folder nor one of {known}")
    other = open_bundle(name, allow_unvalidated=True)
    other_model = model_from_manifest(other)
    same = target_from_manifest(other, target.name, other_model)
    return _target_candidate(other, same, other_model, room, name=shown or other.path.name, kind=BUNDLE)


def _target_candidate(
    files: BundleFiles, target: Target, model: ModelInfo, room: _Room, *, name: str, kind: str
) -> CandidatePlan:
    if room.capacity > target.capacity:
        raise InputError(
            f"{target.name} of {files.path} holds {target.capacity} tokens, {room.capacity} are asked for: "
            "lower --position, --prompt-tokens or --steps"
        )
    request = {**room.request(kind, model), "path": str(files.path), "target": target.name}
    step = _step_graph(files, target)
    return CandidatePlan(name=name, kind=kind, files=files, model=model, target=target, step=step, request=request)


def _baseline_candidate(kind: str, files: BundleFiles, target: Target, model: ModelInfo, room: _Room) -> CandidatePlan:
    reference = files.path / "reference"
    request = {
        **room.request(kind, model),
        "config": files.manifest["config"],
        "reference": str(reference) if reference.is_dir() else None,
        "capacity": target.capacity,
    }
    step = _step_graph(files, target)
    return CandidatePlan(name=kind, kind=kind, files=files, model=model, target=None, step=step, request=request)


def _step_graph(files: BundleFiles, target: Target) -> Path | None:
    name = target.graphs.get("step")
    return None if name is None else files.file(name)


def _once(values: Sequence[_Value]) -> tuple[_Value, ...]:
    """Without what was named before."""
    return tuple(dict.fromkeys(values))


def _default_target(files: BundleFiles) -> str:
    from crt_export.runtime.bundle import Bundle

    return Bundle(files).default_target()
