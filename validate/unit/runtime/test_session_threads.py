"""Threads: sessions side by side, one session for one thread at a time, one pool of threads for all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import InputError
from crt_export.runtime import Bundle, GenerationOptions, SamplingOptions, Session


def run_all(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run every call in a thread of its own; their results in order."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return results


def test_sessions_in_threads_agree_with_one_after_the_other(either: Any) -> None:
    def talk(user: int) -> list[np.ndarray]:
        with either.session(batch=2) as session:
            found = [session.prefill([either.ids(3 + user, seed=user), either.ids(2, seed=50 + user)])]
            found += [session.step([70 + step, 90 + user]) for step in range(8)]
            sampling = SamplingOptions(temperature=0.7, seed=user)
            drawn = session.generate(None, GenerationOptions(max_new_tokens=4, sampling=sampling, ignore_eos=True))
            list(drawn)
            return [*found, np.array(drawn.tokens), session.position]

    expected = [talk(user) for user in range(4)]
    found = run_all([lambda user=user: talk(user) for user in range(4)])
    for one, other in zip(found, expected, strict=True):
        assert not isinstance(one, BaseException), one
        for values, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(values, wanted)


def test_the_graph_of_one_pass_is_loaded_once_for_all_threads(crt: Any, open_engine: Any) -> None:
    with Bundle(crt.bundle.files, open_engine) as bundle:
        sessions = [bundle.session("ort-cpu-fp32") for _ in range(4)]
        found = run_all([lambda s=session: s.prefill([[40, 41, 42]], passes=2) for session in sessions])
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


class Paused:
    """A call that waits inside the engine until it is let go."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        tensors = session._guard.decoder.tensors
        step = tensors.step

        def waiting(*arguments: Any) -> None:
            self.inside.set()
            assert self.go_on.wait(60)
            step(*arguments)

        monkeypatch.setattr(tensors, "step", waiting)


def test_a_session_that_is_busy_refuses_a_second_thread(crt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, twin = crt.session(), crt.session()
    for each in (session, twin):
        each.prefill([crt.ids(3)])
    taken = session.snapshot()
    paused = Paused(session, monkeypatch)
    results: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: results.append(session.step([50])))
    thread.start()
    assert paused.inside.wait(60)
    calls: list[Callable[[], object]] = [
        lambda: session.step([60]),
        lambda: session.advance([60]),
        lambda: session.prefill([[60]]),
        lambda: session.generate([[60]]),
        lambda: session.restore(taken),
        lambda: session.logits,
        lambda: session.next_tokens,
        session.snapshot,
        session.fork,
        session.reset,
    ]
    for call in calls:
        with pytest.raises(InputError, match="this session is busy with a call of another thread"):
            call()
    paused.go_on.set()
    thread.join(60)
    np.testing.assert_array_equal(results[0], twin.step([50]))
    monkeypatch.undo()
    np.testing.assert_array_equal(session.step([51]), twin.step([51]))


def test_closing_the_bundle_waits_for_a_call_that_runs(
    crt: Any, open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(crt.bundle.files, open_engine)
    session = bundle.session("ort-cpu-fp32")
    paused = Paused(session, monkeypatch)
    results: list[np.ndarray] = []
    running = threading.Thread(target=lambda: results.append(session.step([50])))
    running.start()
    assert paused.inside.wait(60)
    closing = threading.Thread(target=bundle.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    with pytest.raises(InputError, match="this session is closed"):
        session.step([51])
    paused.go_on.set()
    for thread in (running, closing):
        thread.join(60)
    assert np.isfinite(results[0]).all()
    with pytest.raises(InputError, match="this session is closed"):
        session.step([51])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads in /proc")
def test_further_sessions_start_no_further_threads(crt_path: Path) -> None:
    """The one loaded graph owns the threads: two of three, the thread that calls is the third."""
    code = f"""
from pathlib import Path
from crt_export import load_bundle

def count():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Threads:")).split()[1])

with load_bundle({str(crt_path)!r}, allow_unvalidated=True) as bundle:
    bundle.session("ort-cpu-fp32", threads=1)
    counts = [count()]
    sessions = [bundle.session("ort-cpu-fp32", threads=3)]
    counts.append(count())
    sessions += [bundle.session("ort-cpu-fp32", threads=3, batch=2, capacity=16 + more) for more in range(5)]
    for session in sessions:
        session.prefill([[40, 41]] * session.batch)
        session.step([42] * session.batch)
    sessions.append(sessions[0].fork())
    counts.append(count())
counts.append(count())
print(counts)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, first, many, closed = json.loads(found.stdout)
    assert (first, many, closed) == (alone + 2, first, alone)
