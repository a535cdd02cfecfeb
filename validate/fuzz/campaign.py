"""Inputs given to both languages, their answers held against the rules, and what broke them made small and kept."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agreement import disagreement
from cases import Case, Inputs, inputs_of_case, new_case, smaller_cases
from seeds import write_seeds

HERE = Path(__file__).parent
#: An input takes milliseconds; a sanitizer makes it slower, a busy machine too.
CASE_SECONDS = 30.0
START_SECONDS = 120.0
#: Findings of one sort that are kept; the others are counted.
MOST_KEPT = 3


class CampaignError(Exception):
    """The fuzzer itself cannot run here."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a campaign runs.

    Attributes:
        languages: ``python``, ``cpp``, or both.
        kinds: Which kinds of inputs.
        seed: Of the random changes.
        library: The C++ library; needed for ``cpp``.
        fault: A fault of planted_faults.py to plant into the Python worker; "" for none.
        kept: Folder for inputs that broke a rule.
    """

    languages: tuple[str, ...]
    kinds: tuple[str, ...]
    seed: int
    library: Path | None
    fault: str
    kept: Path


@dataclass
class Counts:
    """What became of the inputs of one kind in one language."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    findings: int = 0


@dataclass
class Result:
    """What a campaign did.

    Attributes:
        counts: Language, then kind.
        findings: One line for each that was kept.
        kept: Their files.
    """

    counts: dict[str, dict[str, Counts]]
    findings: list[str] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Findings, kept or not."""
        return sum(counts.findings for kinds in self.counts.values() for counts in kinds.values())


class Campaign:
    """Workers of the languages, and the folder that they read; a context manager."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._scratch = Path(tempfile.mkdtemp(prefix="crt_fuzz_"))
        self._seeds, self._folder = self._scratch / "seeds", self._scratch / "folder"
        self._seeds.mkdir()
        write_seeds(self._seeds)
        shutil.copytree(self._seeds, self._folder)
        self._workers: dict[str, Worker] = {}
        self.result = Result({language: {kind: Counts() for kind in setup.kinds} for language in setup.languages})
        self._sorts: dict[str, int] = {}

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self, *, seconds: float, cases: int | None = None) -> Result:
        """Try inputs for that long, or that many of each kind; kinds share the time equally."""
        spent = dict.fromkeys(self._setup.kinds, 0.0)
        numbers = dict.fromkeys(self._setup.kinds, 0)
        self._start_workers()
        deadline = time.monotonic() + seconds
        while True:
            open_kinds = [kind for kind in self._setup.kinds if cases is None or numbers[kind] < cases]
            if not open_kinds or (cases is None and time.monotonic() >= deadline):
                return self.result
            kind = min(open_kinds, key=lambda kind: spent[kind])
            start = time.monotonic()
            self._try_case(new_case(kind, self._setup.seed, numbers[kind]))
            numbers[kind] += 1
            spent[kind] += time.monotonic() - start

    def replay(self, kind: str, inputs: Inputs) -> dict[str, str]:
        """Try one input; what it breaks, by language."""
        return self._broken(kind, inputs)[0]

    def _try_case(self, case: Case) -> None:
        broken, answers = self._broken(case.kind, inputs_of_case(case, self._seeds))
        for language, answer in answers.items():
            counts = self.result.counts[language][case.kind]
            counts.cases += 1
            refused = answer is not None and "refused" in answer.get("verdicts", {}).values()
            if language in broken:
                counts.findings += 1
            elif refused:
                counts.refused += 1
            else:
                counts.accepted += 1
        for language, text in broken.items():
            sort = f"{language} {case.kind} {re.sub(r'[0-9]+|/[^ ]+', '', text)[:60]}"
            self._sorts[sort] = self._sorts.get(sort, 0) + 1
            if self._sorts[sort] <= MOST_KEPT:
                self._keep(case, language, text)

    def _keep(self, case: Case, language: str, text: str) -> None:
        """Make the input smaller while it breaks the same language, then store it."""
        smaller = True
        while smaller:
            smaller = False
            for candidate in smaller_cases(case):
                broken = self._broken(case.kind, inputs_of_case(candidate, self._seeds))[0]
                if language in broken:
                    case, text, smaller = candidate, broken[language], True
                    break
        path = self._setup.kept / f"{language}-{case.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        inputs = inputs_of_case(case, self._seeds)
        content = {"case": dataclasses.asdict(case), "language": language, "finding": text, **inputs.to_dict()}
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8", errors="surrogatepass")
        self.result.findings.append(f"{language} {case.name}: {text} (replay: {path})")
        self.result.kept.append(path)

    def _broken(self, kind: str, inputs: Inputs) -> tuple[dict[str, str], dict[str, dict[str, Any] | None]]:
        """What an input breaks by language, and the answers; None for a worker that gave none."""
        self._start_workers()
        inputs.write(self._folder)
        before = _tree(self._scratch)
        question = json.dumps({"kind": kind, "folder": str(self._folder), "ids": list(inputs.ids)})
        for worker in self._workers.values():
            worker.ask(question)
        broken: dict[str, str] = {}
        answers: dict[str, dict[str, Any] | None] = {}
        for language, worker in list(self._workers.items()):
            answers[language] = worker.answer()
            found = worker.failure if answers[language] is None else (answers[language] or {})["finding"]
            if found:
                broken[language] = found
            if answers[language] is None:
                del self._workers[language]
        after = _tree(self._scratch)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            broken[self._setup.languages[0]] = f"files were written or removed: {', '.join(changed)}"
        if not broken and len(answers) == 2:
            text = disagreement(kind, answers["python"] or {}, answers["cpp"] or {})
            broken |= {"cpp": text} if text else {}
        self._restore()
        return broken, answers

    def _restore(self) -> None:
        """Put every seed back that differs from what it was, and remove what is new."""
        now = _tree(self._folder)
        sound = _tree(self._seeds)
        for name in now.keys() - sound.keys():
            (self._folder / name).unlink()
        for name in sound:
            if now.get(name) != sound[name]:
                shutil.copy2(self._seeds / name, self._folder / name)

    def _start_workers(self) -> None:
        for language in self._setup.languages:
            if language not in self._workers:
                self._workers[language] = Worker(language, self._setup, self._seeds)


class Worker:
    """A process that tries inputs in one language."""

    def __init__(self, language: str, setup: Setup, seeds: Path) -> None:
        self._language = language
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        library = setup.library if language == "cpp" else None
        sanitized = library is not None and is_sanitized(library)
        command = [sys.executable, str(HERE / "worker.py"), "--language", language, "--seeds", str(seeds)]
        command += ["--library", str(library)] if library is not None else []
        command += ["--fault", setup.fault] if language == "python" and setup.fault else []
        command += ["--sanitized"] if sanitized else []
        self._process = subprocess.Popen(
            [*command, "--kinds", *setup.kinds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(sanitized),
        )
        self.failure = ""
        self._limit = CASE_SECONDS
        if self._read(START_SECONDS) is None:
            raise CampaignError(f"the {language} worker does not start: {self.failure}")

    def ask(self, question: str) -> None:
        """Give an input."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says how the process ended

    def answer(self) -> dict[str, Any] | None:
        """What became of it; None, and the reason in ``failure``, where the process ended or hangs."""
        return self._read(self._limit)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _read(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.failure = f"hang: no answer within {seconds:g} s"
                self.stop()
                return None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        self.failure = f"crash: the process ended with {code}: {said[-3000:]}"
        self.stop()
        return None


def is_sanitized(library: Path) -> bool:
    """Whether the library was built with the sanitizers."""
    cache = library.parent / "CMakeCache.txt"
    return cache.is_file() and "CRT_RUNTIME_SANITIZE:BOOL=ON" in cache.read_text("utf-8")


def worker_environment(sanitized: bool) -> Mapping[str, str]:
    """The environment of a worker; Python is not built for the sanitizers and gets their libraries first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if sanitized:
        paths = [_output("g++", f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")]
        environment["LD_PRELOAD"] = ":".join(paths)
        # A request for more memory than there is fails, as it does outside; Python's own leaks are not reported.
        environment["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=3072"
    return environment


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: size and time of its last change."""
    found: dict[str, tuple[int, int]] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                else:
                    status = entry.stat(follow_symlinks=False)
                    found[name] = (status.st_size, status.st_mtime_ns)
    return found


def count_lines(result: Result, languages: Sequence[str]) -> list[str]:
    """The counts as a table."""
    lines = [f"{'language':<9} {'kind':<12} {'cases':>7} {'accepted':>9} {'refused':>8} {'findings':>9}"]
    for language in languages:
        for kind, counts in result.counts[language].items():
            lines.append(
                f"{language:<9} {kind:<12} {counts.cases:>7} {counts.accepted:>9} {counts.refused:>8} "
                f"{counts.findings:>9}"
            )
    return lines
