"""Python and C++ refuse the same unusable calls, say what was found, and go on as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crt_export.errors import InputError
from crt_export.runtime import load_bundle

TARGET = "ort-cpu-fp32"

CALLS: dict[str, tuple[int, Callable[[Any], object], str]] = {
    "id at the vocabulary's end": (1, lambda session: session.step([256]), "256"),
    "id below -1": (1, lambda session: session.step([-2]), "-2"),
    "id in a prompt": (1, lambda session: session.prefill([[1, 2, 2**40, 3]]), str(2**40)),
    "negative id in a prompt": (1, lambda session: session.prefill([[1, -1]]), "-1"),
    "prompt above the capacity": (1, lambda session: session.prefill([[1] * 9]), "8"),
    "too few rows in a step": (2, lambda session: session.step([1]), "2"),
    "too many rows in a prompt": (2, lambda session: session.prefill([[1], [2], [3]]), "3"),
}


@pytest.mark.parametrize("case", CALLS)
def test_both_refuse_an_unusable_call_and_go_on(case: str, tiny: Path, library: Any, c_library: ModuleType) -> None:
    batch, call, shown = CALLS[case]
    cpp = library.bundle(tiny).session(TARGET, batch=batch, capacity=8, threads=1)
    with load_bundle(tiny, allow_unvalidated=True) as opened:
        python = opened.session(TARGET, batch=batch, threads=1, capacity=8)
        with pytest.raises(InputError) as in_python:
            call(python)
        python.prefill([[1] * 8] * batch)  # nothing was written, so the cache still has room for all of it
        with pytest.raises(InputError):
            python.step([1] * batch)
    with pytest.raises(c_library.CrtError) as in_cpp:
        call(cpp)
    assert in_cpp.value.kind == "input"
    for text in (str(in_python.value), in_cpp.value.message):
        assert shown in text
    cpp.prefill([[1] * 8] * batch)
    with pytest.raises(c_library.CrtError) as full:
        cpp.step([1] * batch)
    assert full.value.kind == "input"


@pytest.mark.parametrize(("batch", "capacity"), [(0, 8), (-1, 8), (1, -1), (1, 2**40), (2**40, 8), (2**62, 8)])
def test_both_refuse_an_impossible_session(
    batch: int, capacity: int, tiny: Path, library: Any, c_library: ModuleType
) -> None:
    with load_bundle(tiny, allow_unvalidated=True) as opened, pytest.raises(InputError):
        opened.session(TARGET, batch=batch, capacity=capacity)
    cpp = library.bundle(tiny)
    with pytest.raises(c_library.CrtError) as refused:
        cpp.session(TARGET, batch=batch, capacity=capacity)
    assert refused.value.kind == "input"
