"""The TensorRT session on a recording machine: what it binds, captures, copies, saves and frees.

The machine executes the bundle's own graphs; see validate/unit/engine/recording_tensorrt.py for what it refuses. That
tokens, logits and every rule of a session hold is shown by the session tests themselves, which run over it too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import ContractError, InputError, UnsupportedError
from crt_export.runtime import Bundle, GenerationOptions, Session

Open = Callable[..., Bundle]
PROMPTS = [[40, 41, 42, 43, 44], [50, 51], [60, 61, 62, 63, 64, 65, 66]]


def tensors_of(session: Session) -> Any:
    return session._guard.decoder.tensors


@pytest.fixture
def bundle(recorded_path: Path, open_recorded: Open, recording: Any) -> Any:
    with open_recorded(recorded_path, recording) as opened:
        yield opened


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_tokens_are_those_of_onnx_runtime(bundle: Bundle, batch: int) -> None:
    """Unequal prompts, then rows that stop and go on, so that row slices of every alignment are bound."""
    found, wanted = (bundle.session(target, batch=batch) for target in ("recorded", "ort-cpu-fp32"))
    np.testing.assert_allclose(found.prefill(PROMPTS[:batch]), wanted.prefill(PROMPTS[:batch]), rtol=0, atol=1e-5)
    for step in range(8):
        tokens: list[int | None] = [70 + step + row for row in range(batch)]
        if batch == 3 and step % 2:
            tokens[step % 3] = None
        np.testing.assert_allclose(found.step(tokens), wanted.step(tokens), rtol=0, atol=1e-5)
    options = GenerationOptions(max_new_tokens=8)
    continued = [list(session.generate(options=options)) for session in (found, wanted)]
    assert continued[0] == continued[1]


def test_a_number_of_cpu_threads_loads_no_second_engine(bundle: Bundle) -> None:
    engines = [tensors_of(bundle.session("recorded", threads=threads))._engine for threads in (None, 1, 2)]
    assert len(set(map(id, engines))) == 1


def test_greedy_steps_copy_no_logits_upload_nothing_and_allocate_nothing(bundle: Bundle, recording: Any) -> None:
    session = bundle.session("recorded")
    session.prefill([PROMPTS[0]])
    for _ in range(2):  # both parities are captured
        session.advance(session.next_tokens.tolist())
    device = recording.device
    before, events = device.counts.copy(), len(device.events)
    for _ in range(6):
        session.advance(session.next_tokens.tolist())
    done = device.counts - before
    assert done["launch_graph"] == 6
    assert {"launch_graph", "copy_to_host", "synchronize"} == done.keys(), "only launches and small reads"
    logits = tensors_of(session)._logits.address
    assert ("copy_to_host", logits) not in device.events[events:]
    assert np.isfinite(session.logits).all()
    assert ("copy_to_host", logits) in device.events[events:]


def test_one_graph_per_parity_each_in_a_context_and_on_a_stream_of_its_own(bundle: Bundle, recording: Any) -> None:
    session = bundle.session("recorded")
    session.prefill([PROMPTS[0]])
    for token in range(70, 80):
        session.step([token])
    assert recording.api.runs == ["prefill", "step", "step"], "one enqueue per prefill, one warm-up per graph"
    assert recording.device.counts["end_capture"] == 2
    states = [context.addresses["state"] for context in recording.api.contexts if context.engine.name == "step"]
    assert len(set(states)) == 2
    nexts = [context.addresses["next_state"] for context in recording.api.contexts if context.engine.name == "step"]
    assert states == nexts[::-1]
    assert recording.device.live["streams"] == 1 + len(recording.api.contexts)


def test_prefills_share_a_context_that_steps_do_not_use(bundle: Bundle, recording: Any) -> None:
    session = bundle.session("recorded")
    for length in (3, 5, 1, 4):
        session.prefill([PROMPTS[2][:length]])
    assert Counter(context.engine.name for context in recording.api.contexts) == {"prefill": 1}


def test_the_run_before_a_capture_leaves_no_trace(bundle: Bundle, recording: Any) -> None:
    """The first run of every step context leaves NaN in the caches: they must be put back before the real one."""
    recording.api.spoil_first_run = {"step"}
    found, wanted = (bundle.session(target, batch=3) for target in ("recorded", "ort-cpu-fp32"))
    found.prefill(PROMPTS)
    wanted.prefill(PROMPTS)
    for tokens in ([70, 71, 72], [70, None, 72], [None, 71, 72], [70, 71, 72]):
        np.testing.assert_allclose(found.step(tokens), wanted.step(tokens), rtol=0, atol=1e-5)
    for name, cache in tensors_of(found).caches(32).items():
        np.testing.assert_allclose(cache, tensors_of(wanted).caches(32)[name], rtol=0, atol=1e-5)


def test_a_tensor_that_moves_is_captured_anew(bundle: Bundle, recording: Any) -> None:
    """What lay at the old address is NaN afterwards, so a launch of the old graph would fail."""
    found, wanted = (bundle.session(target) for target in ("recorded", "ort-cpu-fp32"))
    for session in (found, wanted):
        session.prefill([PROMPTS[0]])
        for token in (70, 71):
            session.step([token])
    cache = tensors_of(found)._caches.rows("0.key", 0, 1).buffer
    moved = type(cache)(cache._memory, cache.shape, "float32")
    moved.write(cache.read())
    recording.device.view(cache.address, moved.read().nbytes)[:] = 0xFF
    cache.address = moved.address
    captured = recording.device.counts["end_capture"]
    for token in (72, 73, 74, 75):
        np.testing.assert_allclose(found.step([token]), wanted.step([token]), rtol=0, atol=1e-5)
    assert recording.device.counts["end_capture"] == captured + 2


def test_contexts_are_used_again_by_the_next_session(bundle: Bundle, recording: Any) -> None:
    for _ in range(3):
        with bundle.session("recorded") as session:
            session.prefill([PROMPTS[0]])
            for token in (70, 71, 72):
                session.step([token])
        del session
        assert recording.device.live["graphs"] == 0
    assert len(recording.api.contexts) == 3


def test_closing_frees_everything_on_the_device(recorded_path: Path, open_recorded: Open, recording: Any) -> None:
    bundle = open_recorded(recorded_path, recording)
    left = bundle.session("recorded", batch=2)
    left.prefill(PROMPTS[:2])
    left.step([70, 71])
    state = tensors_of(left)._sides[0].states["state"]
    assert recording.device.live["memory"] > 0
    bundle.close()
    assert {name: count for name, count in recording.device.live.items() if name != "pinned"} == {
        "memory": 0,
        "streams": 0,
        "graphs": 0,
    }
    with pytest.raises(InputError, match="closed"):
        left.step([70, 71])
    with pytest.raises(ContractError, match="this engine is closed: its memory and its graphs are gone"):
        state.read()
    bundle.close()


def test_kernels_are_compiled_before_a_capture_and_late_otherwise(bundle: Bundle, recording: Any) -> None:
    session = bundle.session("recorded")
    session.prefill([PROMPTS[0]])
    session.step([70])
    found = {
        context.engine.name: (
            context.config.dynamic_shapes_kernel_specialization_strategy.name,
            context.config.cuda_graph_strategy.name,
        )
        for context in recording.api.contexts
    }
    assert found == {"prefill": ("LAZY", "DISABLED"), "step": ("EAGER", "DISABLED")}


def test_compiled_kernels_are_kept_for_the_next_process(
    recorded_path: Path, open_recorded: Open, new_recording: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machines = [new_recording(), new_recording(), new_recording()]
    for number, machine in enumerate(machines):
        with open_recorded(recorded_path, machine) as bundle, bundle.session("recorded") as session:
            session.prefill([PROMPTS[0]])
            session.step([70])
        if number == 1:
            for file in tmp_path.rglob("*.cache"):
                file.write_bytes(file.read_bytes()[:-1])
    given = [sorted(cache.given or b"" for cache in machine.api.caches) for machine in machines]
    assert given == [[b"", b""], [b"prefill", b"step"], [b"", b""]], "nothing yet, what was kept, damaged: nothing"


def test_a_target_without_prefill_pass_says_what_to_do_instead(bundle: Bundle) -> None:
    session = bundle.session("recorded")
    with pytest.raises(UnsupportedError, match=r"recorded has no prefill_pass engine, only step, prefill: run the num"):
        session.prefill([PROMPTS[0]], passes=2)


def test_limits_of_the_engine_are_limits_of_the_session(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="compiled for a capacity of 32, found 16"):
        bundle.session("recorded", capacity=16)
    with pytest.raises(InputError, match="batch of at most 4, found 5"):
        bundle.session("recorded", batch=5)
