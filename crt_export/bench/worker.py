"""One candidate in a process of its own, spoken to in JSON lines: the parent's side, then the child's.

A request is one object on stdin, ``{"op": name, ...}``; its answer one object on stdout, ``{"result": ...}`` or
``{"error": {"type", "message"}}``. What libraries print goes to stderr. The first request names the candidate.
When stdin ends, because the parent closed it or died, the process ends at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from crt_export import errors
from crt_export.bench import process_memory
from crt_export.child_process import ChildEnd, Lifeline, answer_stream, start_module
from crt_export.errors import BenchError, CrtExportError

if TYPE_CHECKING:  # what a candidate imports is timed
    from crt_export.bench.runner import Runner

#: Kinds of candidates beside those of the report: the probe of bandwidth and compute.
PROBE = "probe"

Request = Mapping[str, Any]


class WorkerProcess:
    """A process of ``crt_export.bench.worker``; closed, it is gone, and whatever it started is gone with it.

    Attributes:
        name: What it runs, for messages.
    """

    def __init__(self, name: str, *, single_threaded_blas: bool = False) -> None:
        """Start it."""
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        if single_threaded_blas:
            environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        else:
            environment.pop("OMP_NUM_THREADS", None)  # the number of threads is an option of the benchmark
        self._lifeline = Lifeline()
        self._process = start_module(
            __name__,
            self._lifeline,
            environment=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            own_group=True,  # Ctrl-C reaches the parent alone, which then ends the group, a compiler included
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, op: str, **values: Any) -> Any:
        """Send a request and wait for the answer.

        Raises:
            CrtExportError: What the worker raised, of the same type.
            BenchError: It raised anything else, or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise _error(self.name, answer["error"]["type"], answer["error"]["message"])
        return answer["result"]

    def close(self) -> None:
        """End it and everything it started, at once; closing twice is harmless."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self._lifeline.close()
        for stream in (self._process.stdin, self._process.stdout, self._words):
            with contextlib.suppress(OSError, ValueError):  # what was not sent cannot be
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _death(self) -> BenchError:
        code = self._process.wait()
        self._words.seek(0)
        end = ChildEnd(code=code, answer=b"", printed=self._words.read().decode(errors="replace"))
        hint = "; most likely it ran out of memory" if code == -9 else ""
        said = f"\nits last words:\n{end.last_words}" if end.printed.strip() else ""
        return BenchError(f"the process that ran {self.name} died: {end.cause}{hint}{said}")


def _error(name: str, kind: str, message: str) -> CrtExportError:
    """The worker's error again: of the same type where it was a deliberate one."""
    known = {found.__name__: found for found in vars(errors).values() if _deliberate(found)}
    return known[kind](message) if kind in known else BenchError(f"{name} failed: {kind}: {message}")


def _deliberate(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, CrtExportError)


class Worker:
    """Answers requests about one candidate."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._before = process_memory.Usage(pss=None, anonymous=None)
        self._device_before: int | None = None

    def open(self, request: Request) -> dict[str, Any]:
        """Import, open, first token; then what steps alone hold in memory."""
        begin = time.perf_counter()
        runner = self._runner = runner_from_request(request)
        imported = time.perf_counter()
        path = runner.weight_path()
        share = None if path is None else process_memory.cached_share(path)
        self._before, self._device_before = process_memory.usage(), process_memory.device_bytes_in_use()
        start = time.perf_counter()
        runner.open()
        opened = time.perf_counter()
        runner.first_token()
        first = time.perf_counter()
        runner.steps(0, 0, 3)
        held = process_memory.usage()
        return {
            "load": {
                "import_s": imported - begin,
                "open_s": opened - start,
                "first_token_s": first - start,
                "cached_share": share,
            },
            "memory": {
                "pss_before": self._before.pss,
                "anonymous_before": self._before.anonymous,
                "pss_step": held.pss,
                "anonymous_step": held.anonymous,
            },
            "info": asdict(runner.info()),
        }

    def memory(self, request: Request) -> dict[str, Any]:
        """What a prompt, and then a second session, add; a candidate without prefill keeps what it held."""
        runner = self._opened()
        if request["tokens"]:
            runner.prefill(request["tokens"], None)
        with_prefill = process_memory.usage()
        device = process_memory.device_bytes_in_use()
        runner.open_second_session()
        second = process_memory.usage()
        runner.close_second_session()
        return {
            "pss": with_prefill.pss,
            "anonymous": with_prefill.anonymous,
            "second_session": _difference(second.pss, with_prefill.pss),
            "device": _difference(device, self._device_before),
        }

    def steps(self, request: Request) -> dict[str, Any]:
        """Seconds of every step of a block, and the part inside the engine."""
        times = self._opened().steps(request["position"], request["warmups"], request["count"])
        return {"seconds": list(times.seconds), "engine": list(times.engine)}

    def prefill(self, request: Request) -> float:
        """Seconds of one prompt."""
        return self._opened().prefill(request["tokens"], request["passes"])

    def peak_rss(self, request: Request) -> int | None:
        """The largest resident set so far."""
        del request
        return process_memory.peak_rss()

    def _opened(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("the first request must open a candidate")
        return self._runner


class ProbeWorker:
    """Answers requests about the machine."""

    def __init__(self) -> None:
        self._probe: Any = None

    def open(self, request: Request) -> None:
        """Allocate what is read."""
        from crt_export.bench.probe import Probe

        self._probe = Probe(request["threads"], request["bytes"])

    def sample(self, request: Request) -> dict[str, list[float]]:
        """Rates right now."""
        return {
            "read_gb_s": self._probe.read_gb_s(request["samples"]),
            "gflop_s": self._probe.gflop_s(1),
        }


def runner_from_request(request: Request) -> Runner:
    """The candidate that a request names, its libraries imported."""
    if request["kind"] in ("target", "bundle"):
        from crt_export.bench.bundle_runner import BundleRunner

        return BundleRunner(
            Path(request["path"]),
            request["target"],
            batch=request["batch"],
            threads=request["threads"],
            text=request.get("text", ()),
        )
    from crt_export.bench.pytorch_runner import PyTorchRunner
    from crt_export.config import ModelConfig

    return PyTorchRunner(
        request["kind"],
        ModelConfig.from_dict(request["config"]),
        None if request["reference"] is None else Path(request["reference"]),
        batch=request["batch"],
        capacity=request["capacity"],
        threads=request["threads"],
        text=request.get("text", ()),
    )


def serve(requests: Callable[[], str], answers: IO[str]) -> None:
    """Answer until the process is ended."""
    worker: Worker | ProbeWorker | None = None
    while True:
        request = json.loads(requests())
        try:
            if worker is None:
                worker = ProbeWorker() if request["kind"] == PROBE else Worker()
            answer: dict[str, Any] = {"result": getattr(worker, request["op"])(request)}
        except Exception as error:  # whatever it is, the parent decides what becomes of it
            answer = {"error": {"type": type(error).__name__, "message": str(error)}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Run as a worker process."""
    answers = io.TextIOWrapper(answer_stream(), encoding="utf-8")  # what libraries print is no answer
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    serve(lines.get, answers)


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


if __name__ == "__main__":
    main()
