"""A session of the C++ library does not depend on the files of its bundle once it is open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from crt_export.bundle.exchange import exchange_folders

TARGET = "ort-cpu-fp32"
WEIGHTS = "graphs/fp32.weights"


def negated(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3::4] = bytes(value ^ 0x80 for value in content[3::4])
    with path.open("r+b") as stream:
        stream.write(content)


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    """A bundle of its own, to be spoiled."""
    return Path(shutil.copytree(tiny, tmp_path / "demo"))


@pytest.mark.parametrize(
    "spoil",
    [negated, lambda path: os.truncate(path, 0), lambda path: shutil.rmtree(path.parents[1])],
    ids=["overwritten", "truncated", "removed"],
)
def test_an_open_session_does_not_depend_on_its_files(
    spoil: Callable[[Path], None], bundle: Path, library: Any
) -> None:
    opened = library.bundle(bundle)
    session, other = (opened.session(TARGET, threads=1) for _ in range(2))
    assert str(bundle / WEIGHTS) not in Path("/proc/self/maps").read_text()
    first = np.array(session.prefill([[1, 2, 3]]))
    spoil(bundle / WEIGHTS)
    assert np.array_equal(other.prefill([[1, 2, 3]]), first)


def test_a_bundle_that_was_exchanged_loads_what_was_opened(bundle: Path, tmp_path: Path, library: Any) -> None:
    expected = np.array(library.bundle(bundle).session(TARGET, threads=1).prefill([[1, 2, 3]]))
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    negated(other / WEIGHTS)
    opened = library.bundle(bundle)
    if not exchange_folders(bundle, other):
        pytest.skip("this file system cannot exchange folders")
    assert np.array_equal(opened.session(TARGET, threads=1).prefill([[1, 2, 3]]), expected)


def test_weights_overwritten_after_the_bundle_was_opened_are_refused(
    bundle: Path, library: Any, c_library: ModuleType
) -> None:
    opened = library.bundle(bundle)
    negated(bundle / WEIGHTS)
    with pytest.raises(c_library.CrtError, match=r"fp32\.weights.*has SHA-256"):
        opened.session(TARGET, threads=1)
