"""An interrupt at any instruction: the session is as it was or poisoned, and nobody waits for it for ever.

Instructions are counted with a tracer that sees every one of the package's runtime; it raises at the n-th. That is
stricter than signals and ``PyThreadState_SetAsyncExc``, which Python looks at after calls and jumps only. So one
outcome more is allowed, at the instruction that gives the result back: the call has ended, and its result is lost.
"""

from __future__ import annotations

import ctypes
import dis
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

import crt_export.exclusive
import crt_export.runtime
from crt_export.errors import InputError
from crt_export.runtime import Bundle, Generation, GenerationOptions, SamplingOptions, Session, Snapshot
from crt_export.runtime.opening import engine_from_target

TARGET = "ort-cpu-fp32"
PROMPT = [[40, 41, 42, 43, 44]]
GREEDY = GenerationOptions(max_new_tokens=3, ignore_eos=True)
SAMPLED = GenerationOptions(
    max_new_tokens=3, ignore_eos=True, sampling=SamplingOptions(temperature=0.8, repetition_penalty=1.2, seed=7)
)
_ROOTS = (str(Path(crt_export.runtime.__file__).parent), crt_export.exclusive.__file__)
#: Tests meet every so manieth instruction, evidence all of them.
EVERY = pytest.mark.parametrize("stride", [pytest.param(83), pytest.param(1, marks=pytest.mark.evidence)])


class Interrupted(BaseException):
    """What a signal handler raises."""


@dataclass
class Tracer:
    """Raises at one instruction of the runtime.

    Attributes:
        at: Number of that instruction.
        seen: Instructions so far.
        where: Function and operation that the interrupt came before; empty if it did not.
    """

    at: int
    seen: int = 0
    where: str = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Tracer | None:
        if not frame.f_code.co_filename.startswith(_ROOTS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.seen += 1
            if self.seen == self.at:
                self.where = f"{frame.f_code.co_qualname} {_operations(frame.f_code)[frame.f_lasti]}"
                raise Interrupted
        return self

    def run(self, call: Callable[[], Any]) -> bool:
        """Make a call; whether it was interrupted."""
        previous = sys.gettrace()
        try:
            sys.settrace(self)
            call()
        except Interrupted:
            pass
        finally:
            sys.settrace(previous)
        return bool(self.where)

    @property
    def gives_back(self) -> bool:
        """Whether the call had ended but for giving its result back."""
        return self.where.endswith("RETURN_VALUE")


_KNOWN: dict[CodeType, dict[int, str]] = {}


def _operations(code: CodeType) -> dict[int, str]:
    if code not in _KNOWN:
        _KNOWN[code] = {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}
    return _KNOWN[code]


def interrupts(call: Callable[[], Any], stride: int, prepare: Callable[[], Any] = lambda: None) -> Iterator[Tracer]:
    """Make a call again and again, each time interrupted at a later instruction, until it ends by itself."""
    for at in itertools.count(1 + stride // 2, stride):
        prepare()
        tracer = Tracer(at)
        if not tracer.run(call):
            assert tracer.seen > 50, "the tracer has seen the call"
            return
        yield tracer


def same(found: Snapshot, expected: Snapshot) -> bool:
    return all(
        np.array_equal(found.tensors[name], values, equal_nan=values.dtype.kind == "f")
        for name, values in expected.tensors.items()
    )


def content(session: Session) -> Snapshot | None:
    """What the session holds; None if it is poisoned. Any other refusal, busy above all, is a fault."""
    try:
        return session.snapshot()
    except InputError as error:
        if "an earlier call of this session failed" not in str(error):
            raise
        return None


def closes(close: Callable[[], Any]) -> None:
    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "close() hangs"


CALLS: dict[str, Callable[[Session, Snapshot], Any]] = {
    "step": lambda session, other: session.step([60]),
    "advance": lambda session, other: session.advance([60]),
    "prefill": lambda session, other: session.prefill([[60, 61, 62, 63]]),
    "prefill in passes": lambda session, other: session.prefill([[60, 61, 62, 63]], passes=2),
    "prefill token by token": lambda session, other: session.prefill([[60, 61]], passes="exact"),
    "snapshot": lambda session, other: session.snapshot(),
    "logits": lambda session, other: session.logits,
    "restore": lambda session, other: session.restore(other),
    "reset": lambda session, other: session.reset(),
    "generate": lambda session, other: session.generate(PROMPT, GREEDY),
}
CHANGE_NOTHING = ("snapshot", "logits", "generate")


@EVERY
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_leaves_the_session_untouched_or_poisoned(crt_cpu: Any, name: str, stride: int) -> None:
    call = CALLS[name]
    with crt_cpu.session(capacity=32) as session:
        session.prefill(PROMPT)
        session.history.draw(0, 77, keep=True)
        before = session.snapshot()
        next_logits = session.step([50])
        other = session.snapshot()
        session.restore(before)
        call(session, other)
        after = session.snapshot()
        met = 0
        for tracer in interrupts(lambda: call(session, other), stride, lambda: session.restore(before)):
            found = content(session)
            met += 1
            if found is None:
                assert name not in CHANGE_NOTHING, tracer.where
                continue
            assert same(found, before) or (tracer.gives_back and same(found, after)), tracer.where
            if same(found, before):
                np.testing.assert_array_equal(session.step([50]), next_logits)
        assert met
        session.reset()
        session.restore(before)
        np.testing.assert_array_equal(session.step([50]), next_logits)
        closes(session.close)


@EVERY
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_interrupted_generation_goes_on_rightly_or_refuses(
    crt_cpu: Any, options: GenerationOptions, stride: int
) -> None:
    with crt_cpu.session(capacity=32) as session:
        session.prefill([[90]])
        session.history.draw(0, 77, keep=True)
        before = session.snapshot()
        whole = session.generate(PROMPT, options)
        between = [before] + [session.snapshot() for _ in whole]
        made: list[Generation] = []

        def prepare() -> None:
            session.restore(before)
            made[:] = [session.generate(PROMPT, options)]

        kinds = set()
        for tracer in interrupts(lambda: list(made[0]), stride, prepare):
            found = content(session)
            if found is None:
                kinds.add("poisoned")
                with pytest.raises(InputError, match=r"interrupted|an earlier call of this session failed"):
                    next(made[0])
                continue
            assert any(same(found, known) for known in between), tracer.where
            try:
                list(made[0])
            except InputError as error:
                if "interrupted in the middle of a token" not in str(error):
                    raise
                kinds.add("refused")
                continue
            kinds.add("went on")
            assert made[0].tokens == whole.tokens, tracer.where
            assert made[0].texts == whole.texts
        assert {"poisoned", "went on"} <= kinds
        session.restore(before)
        again = session.generate(PROMPT, options)
        list(again)
        assert again.tokens == whole.tokens


@EVERY
def test_an_interrupted_close_closes_at_the_second_try(crt_cpu: Any, stride: int) -> None:
    sessions: list[Session] = []
    for _ in interrupts(
        lambda: sessions[0].close(),
        max(1, stride // 10),
        lambda: sessions.__setitem__(slice(None), [crt_cpu.session()]),
    ):
        closes(sessions[0].close)
        with pytest.raises(InputError, match="this session is closed"):
            sessions[0].step([40])


@EVERY
def test_an_interrupted_fork_leaves_the_session_untouched(crt_cpu: Any, stride: int) -> None:
    with crt_cpu.session() as session:
        session.prefill(PROMPT)
        before = session.snapshot()
        for tracer in interrupts(session.fork, stride):
            found = content(session)
            assert found is not None, tracer.where
            assert same(found, before)


@EVERY
def test_opening_and_closing_a_bundle_can_be_interrupted_and_repeated(crt_cpu: Any, stride: int) -> None:
    bundles: list[Bundle] = []

    def prepare() -> None:
        bundles[:] = [Bundle(crt_cpu.bundle.files, engine_from_target)]

    def use() -> None:
        with bundles[0] as bundle:
            bundle.session(TARGET, threads=1).step([40])

    for tracer in interrupts(use, stride * 2, prepare):
        closes(bundles[0].close)
        assert not bundles[0]._engines, tracer.where
        with pytest.raises(InputError, match="this bundle is closed"):
            bundles[0].session(TARGET)


def test_a_handler_that_closes_what_it_has_interrupted_is_told_so(
    crt_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread of the running call, waiting for its end would never end."""
    session = crt_cpu.session()
    tensors = session._guard.decoder.tensors
    step = tensors.step

    def handled(*arguments: Any) -> None:
        with pytest.raises(InputError, match="in the middle of a call of this very thread"):
            session.close()
        step(*arguments)

    monkeypatch.setattr(tensors, "step", handled)
    assert np.isfinite(session.step([40])).all()
    closes(session.close)


def alarm(delay_s: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, delay_s)


def cancellation(delay_s: float) -> None:
    """What asynchronous cancellation does: an exception set from another thread."""
    thread = ctypes.c_ulong(threading.get_ident())

    def cancel() -> None:
        time.sleep(delay_s)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Interrupted))

    threading.Thread(target=cancel, daemon=True).start()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no interval timers")
@pytest.mark.parametrize("interrupt", [alarm, cancellation])
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.evidence)])
def test_real_interrupts(crt_cpu: Any, interrupt: Callable[[float], None], count: int) -> None:
    def handler(*_: Any) -> None:
        raise Interrupted

    def went_on() -> None:
        list(session.generate([[45]], SAMPLED))
        session.step([50])
        session.restore(before)
        time.sleep(0)

    rng = np.random.default_rng(0)
    earlier = signal.signal(signal.SIGALRM, handler)
    try:
        with crt_cpu.session(capacity=32) as session:
            session.prefill(PROMPT)
            before = session.snapshot()
            expected = session.step([50])
            for _ in range(count):
                session.restore(before)
                try:
                    interrupt(float(rng.uniform(0.0001, 0.004)))
                    while True:
                        went_on()
                except Interrupted:
                    pass
                content(session)  # poisoned or not, never busy
                session.restore(before)
                np.testing.assert_array_equal(session.step([50]), expected)
            closes(session.close)
    finally:
        signal.signal(signal.SIGALRM, earlier)
