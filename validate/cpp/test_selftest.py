"""crt-selftest says of the same bundles what crt-export selftest says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import BundleError
from crt_export.runtime import Snapshot
from crt_export.runtime.tensor_file import read_tensor_file, tensor_file_bytes
from crt_export.selftest import run_selftest
from crt_export.selftest.vectors import VECTORS, VECTORS_FILE

TARGET = "ort-cpu-fp32"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def selftest(cpp_build: Path) -> Run:
    """``selftest(*arguments)``: the built program; built with sanitizers, it brings them itself."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [cpp_build / "crt-selftest", *map(str, arguments)],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.fixture
def edit_vectors(copy: Path, sign_again: Callable[[Path], None]) -> Callable[..., Path]:
    def change(edit: Callable[[dict[str, str], dict[str, np.ndarray]], object]) -> Path:
        metadata, tensors = read_tensor_file(VECTORS, copy / VECTORS_FILE)
        edit(metadata, tensors)
        (copy / VECTORS_FILE).write_bytes(tensor_file_bytes(VECTORS, metadata, tensors))
        sign_again(copy)
        return copy

    return change


def without_figures(text: str) -> str:
    """The sentences; the two languages sum alike, but print and round the last digit their own way."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text)


def off(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("off: ") for line in result.stdout.splitlines() if line.startswith("off: ")]


def test_a_sound_bundle_passes(selftest: Run, tiny: Path) -> None:
    result = selftest(tiny, TARGET, "chunked")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"^(ort-cpu-fp32|chunked)  \w+  .*passed$", result.stdout, re.M)) == 8
    assert "self-test: passed (2 targets" in result.stdout


def test_a_windowed_model_passes(selftest: Run, windowed: Path) -> None:
    assert selftest(windowed, TARGET).returncode == 0


@pytest.mark.parametrize("weight", ["lm_head.weight", "layers.0.mlp.down.weight"])
def test_a_changed_step_graph_is_named_as_in_python(
    selftest: Run, copy: Path, change_step_weight: Callable[..., None], weight: str
) -> None:
    change_step_weight(copy, weight, 1.01)
    result = selftest(copy, TARGET)
    assert result.returncode == 1, result.stderr
    found = off(result)
    assert any(line.startswith(f"{TARGET}, step: logits after the prompt of") for line in found)
    expected = run_selftest(copy, [TARGET]).failures
    assert [without_figures(line) for line in found] == [without_figures(line) for line in expected]


def test_changed_vectors_are_named_as_in_python(selftest: Run, edit_vectors: Callable[..., Path]) -> None:
    def edit(_: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
        tensors["recurrence.state"][5] += 0.5
        tensors["recurrence.past_key_values.0.value"][2, 9] += 0.5
        tensors["prefill.k3.chunk12.logits.7"][200] -= 3
        tensors["recurrence.next_tokens"][3] ^= 1
        tensors["recurrence.margins"][3] = 9

    bundle = edit_vectors(edit)
    result = selftest(bundle, TARGET)
    assert result.returncode == 1, result.stderr
    assert any("step: state after step 5 is off by" in line for line in off(result))
    assert any("value at position 9 is off by" in line for line in off(result))
    expected = run_selftest(bundle, [TARGET]).failures
    assert [without_figures(line) for line in off(result)] == [without_figures(line) for line in expected]


def test_values_in_a_scale_of_their_own_are_understood_alike(selftest: Run, edit_vectors: Callable[..., Path]) -> None:
    def edit(_: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
        divisors = np.full((4, 8), 2, np.float32)
        divisors[1, 3] = 0.25
        tensors["value_divisors.fp32.0"] = divisors
        for name, values in tensors.items():
            if name.endswith(".value"):
                values *= divisors[:, None]

    bundle = edit_vectors(edit)
    assert run_selftest(bundle, [TARGET]).passed
    assert selftest(bundle, TARGET).returncode == 0


FAULTS: dict[str, Callable[[dict[str, str], dict[str, Any]], object]] = {
    "other checkpoint": lambda m, t: m.update(checkpoint="f" * 64),
    "prompt": lambda m, t: m.update(prompt="0"),
    "absurd steps": lambda m, t: m.update(steps="999999999"),
    "limits": lambda m, t: m.update(limits='{"fp32": -1}'),
    "NaN": lambda m, t: t["recurrence.state"].__setitem__((3, 0), np.nan),
    "missing": lambda m, t: t.pop("recurrence.logits.4"),
    "unknown": lambda m, t: t.update(extra=np.zeros(1, np.float32)),
    "shape": lambda m, t: t.update({"recurrence.margins": np.zeros(3, np.float32)}),
    "token": lambda m, t: t["input_ids"].__setitem__(0, 256),
    "no run": lambda m, t: [t.pop(name) for name in list(t) if name.startswith("prefill.k3.chunk12")],
    "no limit": lambda m, t: m.update(limits='{"w8": 0.1}'),
    "divisor": lambda m, t: t.update({"value_divisors.w8.0": np.zeros((4, 8), np.float32)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_vectors_are_refused_in_the_same_words(
    selftest: Run, edit_vectors: Callable[..., Path], fault: str
) -> None:
    bundle = edit_vectors(FAULTS[fault])
    result = selftest(bundle, TARGET)
    assert result.returncode == 2, result.stdout
    with pytest.raises(BundleError) as refusal:
        run_selftest(bundle, [TARGET])
    assert result.stderr == f"error: {refusal.value}\n"


@pytest.mark.parametrize("cut", [0, 7, 500, -1])
def test_truncated_vectors_are_refused(selftest: Run, copy: Path, sign_again: Any, cut: int) -> None:
    file = copy / VECTORS_FILE
    file.write_bytes(file.read_bytes()[:cut])
    result = selftest(copy, TARGET)
    assert result.returncode == 2
    assert "the manifest says" in result.stderr
    sign_again(copy)
    result = selftest(copy, TARGET)
    assert result.returncode == 2
    assert "is not a file of self-test vectors or damaged" in result.stderr


def test_a_newer_format_is_refused(selftest: Run, copy: Path, sign_again: Any) -> None:
    file = copy / VECTORS_FILE
    file.write_bytes(file.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    sign_again(copy)
    result = selftest(copy, TARGET)
    assert result.returncode == 2
    assert "format version 2; this version reads up to 1: upgrade crt-export" in result.stderr


def test_a_bundle_without_vectors_says_how_to_get_some(selftest: Run, copy: Path, sign_again: Any) -> None:
    shutil.rmtree(copy / "selftest")
    sign_again(copy)
    result = selftest(copy)
    assert result.returncode == 2
    assert "has no selftest/vectors.safetensors" in result.stderr
    assert "build it again" in result.stderr


def test_exit_codes_of_targets_and_arguments(selftest: Run, tiny: Path) -> None:
    assert selftest().returncode == 2
    assert selftest("--help").returncode == 0
    assert selftest(tiny, "none").returncode == 2
    everything = selftest(tiny)  # one of its targets promises what its graphs do not keep
    assert everything.returncode == 1
    assert any(line.startswith("broken, open: ") for line in off(everything))


def test_both_languages_write_the_same_file(library: Any, tiny: Path, in_python: Any, tmp_path: Path) -> None:
    session = library.bundle(tiny).session(TARGET)
    session.prefill([[65, 66, 67]])
    session.save(tmp_path / "c")
    again = in_python.session(TARGET)
    snapshot = Snapshot.load(tmp_path / "c")
    again.restore(snapshot)
    again.snapshot().save(tmp_path / "python")
    assert (tmp_path / "python").read_bytes() == (tmp_path / "c").read_bytes()
