"""A snapshot file written in one language goes on in the other exactly as it would have at home."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import BundleError
from crt_export.runtime import Bundle, GenerationOptions, SamplingOptions, Snapshot

TARGET = "ort-cpu-fp32"
PROMPTS = [[65, 66, 67, 68, 69], [], [71, 72, 73]]
SAMPLING: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.2, "seed": 9}


def start(session: Any) -> None:
    """Rows of unequal length, one of them empty."""
    session.prefill(PROMPTS)
    session.step([80, None, 81])


def in_python_generate(session: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int | None]]:
    options = GenerationOptions(max_new_tokens=count, sampling=SamplingOptions(**SAMPLING))
    return list(session.generate(prompts, options))


def in_c_generate(session: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    return list(session.generate(prompts, max_new_tokens=count, sampling=SAMPLING))


def test_a_python_snapshot_goes_on_in_c(in_python: Bundle, in_c: Any, tmp_path: Path) -> None:
    home, away = in_python.session(TARGET, batch=3), in_c.session(TARGET, batch=3)
    start(home)
    in_python_generate(home, [[], [90], []], 4)
    home.snapshot().save(tmp_path / "state")
    away.load(tmp_path / "state")
    np.testing.assert_array_equal(away.position, home.position)
    np.testing.assert_array_equal(away.logits, home.logits)
    assert in_c_generate(away, [], 6) == in_python_generate(home, [[], [], []], 6)
    np.testing.assert_allclose(away.logits, home.logits, rtol=0, atol=1e-5)


def test_a_c_snapshot_goes_on_in_python(in_python: Bundle, in_c: Any, tmp_path: Path) -> None:
    home, away = in_c.session(TARGET, batch=3), in_python.session(TARGET, batch=3)
    start(home)
    in_c_generate(home, [[], [90], []], 4)
    home.save(tmp_path / "state")
    away.restore(Snapshot.load(tmp_path / "state"))
    np.testing.assert_array_equal(away.position, home.position)
    np.testing.assert_array_equal(away.logits, home.logits)
    assert in_python_generate(away, [[], [], []], 6) == in_c_generate(home, [], 6)
    np.testing.assert_allclose(away.logits, home.logits, rtol=0, atol=1e-5)


def test_both_write_the_same_bytes_of_every_tensor(in_python: Bundle, in_c: Any, tmp_path: Path) -> None:
    here, there = in_python.session(TARGET, batch=3), in_c.session(TARGET, batch=3)
    for session in (here, there):
        start(session)
    here.snapshot().save(tmp_path / "python")
    there.save(tmp_path / "c")
    ours, theirs = (Snapshot.load(tmp_path / name) for name in ("python", "c"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert theirs.tensors[name].dtype == tensor.dtype
        np.testing.assert_allclose(theirs.tensors[name], tensor, rtol=0, atol=1e-5)
    assert (ours.bundle, ours.target) == (theirs.bundle, theirs.target)
    assert in_c.identity == ours.bundle


def test_text_goes_on_in_the_other_language(in_python: Bundle, in_c: Any, tmp_path: Path) -> None:
    """Token by token, each in the language that did not make the one before; a stop string is cut as well."""
    prompt, count = [[72, 101]], 24

    def unbroken(stops: tuple[str, ...]) -> Any:
        options = GenerationOptions(max_new_tokens=count, sampling=SamplingOptions(**SAMPLING), stop_strings=stops)
        generation = in_python.session(TARGET).generate(prompt, options)
        list(generation)
        return generation

    text = unbroken(()).texts[0]
    middle = len(text) // 2
    for stops in ((), (text[middle : middle + 3], text[middle - 2] + "never")):
        expected = unbroken(stops)
        found: list[str] = []
        tokens: list[int] = []
        rest, reason = "", None
        while len(tokens) < count and reason != "stop_string":
            given: list[list[int]] = [[]] if tokens else prompt
            by_python, by_c = in_python.session(TARGET), in_c.session(TARGET)
            if len(tokens) % 2:
                by_c.load(tmp_path / "state")
                part = by_c.generate(given, max_new_tokens=1, sampling=SAMPLING, stop_strings=stops)
                part.run()
                tokens += part.tokens(0)
                found.append(part.text(0))
                rest, reason = part.rest(0), part.stop_reason(0)
                by_c.save(tmp_path / "state")
            else:
                if tokens:
                    by_python.restore(Snapshot.load(tmp_path / "state"))
                options = GenerationOptions(max_new_tokens=1, sampling=SamplingOptions(**SAMPLING), stop_strings=stops)
                going = by_python.generate(given, options)
                list(going)
                tokens += going.tokens[0]
                found.append(going.texts[0])
                rest, reason = going.rest[0], going.stop_reasons[0]
                by_python.snapshot().save(tmp_path / "state")
        assert (tokens, "".join(found), rest) == (expected.tokens[0], expected.texts[0], expected.rest[0])
        assert reason == expected.stop_reasons[0] == ("stop_string" if stops else "max_new_tokens")


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_both_refuse_a_damaged_file(in_python: Bundle, in_c: Any, c_library: Any, tmp_path: Path, cut: int) -> None:
    session = in_python.session(TARGET)
    session.prefill([PROMPTS[0]])
    session.snapshot().save(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[:cut])
    with pytest.raises(BundleError):
        Snapshot.load(tmp_path / "state")
    with pytest.raises(c_library.CrtError) as refusal:
        in_c.session(TARGET).load(tmp_path / "state")
    assert refusal.value.kind == "bundle"
