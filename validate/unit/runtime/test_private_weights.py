"""What a session computes does not depend on the bundle's files once it is open."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle import HeldGraph
from crt_export.bundle.manifest import sealed
from crt_export.engine import ort
from crt_export.engine.memory_map import REPLACES_MAPPINGS, make_private, mappings_of
from crt_export.errors import BundleError
from crt_export.runtime import load_bundle

TARGET = "ort-cpu-fp32"
WEIGHTS = "graphs/fp32.weights"
on_linux = pytest.mark.skipif(not REPLACES_MAPPINGS, reason="mappings are found and replaced on Linux only")


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Any], tmp_path: Path) -> Path:
    """A bundle of its own, to be spoiled."""
    return Path(shutil.copytree(tiny_bundle("crt", num_hidden_layers=1, unroll_steps=3)[0], tmp_path / "demo"))


def other_weights(path: Path) -> None:
    """Negate every weight, in place."""
    content = bytearray(path.read_bytes())
    content[3::4] = bytes(value ^ 0x80 for value in content[3::4])
    with path.open("r+b") as stream:
        stream.write(content)


def truncated(path: Path) -> None:
    os.truncate(path, 0)


def removed(path: Path) -> None:
    shutil.rmtree(path.parents[1])


@on_linux
@pytest.mark.parametrize("spoil", [other_weights, truncated, removed])
def test_an_open_session_does_not_depend_on_its_files(spoil: Callable[[Path], None], bundle: Path) -> None:
    with load_bundle(bundle, allow_unvalidated=True) as opened:
        session = opened.session(TARGET, threads=1)
        assert str(bundle / WEIGHTS) not in Path("/proc/self/maps").read_text()
        first = session.prefill([[1, 2, 3]])
        session.reset()
        spoil(bundle / WEIGHTS)
        assert np.array_equal(session.prefill([[1, 2, 3]]), first)


@on_linux
def test_weights_stay_mapped_where_the_profile_says_so(bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["targets"][TARGET]["profile"].setdefault("options", {})["mmap"] = True
    path.write_text(json.dumps(sealed(manifest)), "utf-8")
    with load_bundle(bundle, allow_unvalidated=True) as opened, opened.session(TARGET, threads=1):
        assert str(bundle / WEIGHTS) in Path("/proc/self/maps").read_text()


def test_weights_from_memory_give_the_same_bits(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = []
    for mapped in (True, False):
        monkeypatch.setattr(ort, "REPLACES_MAPPINGS", mapped and REPLACES_MAPPINGS)
        with load_bundle(bundle, allow_unvalidated=True) as opened, opened.session(TARGET, threads=1) as session:
            logits.append(session.prefill([[1, 2, 3]]))
    assert np.array_equal(*logits)


def test_a_bundle_that_is_removed_before_its_session_opens_is_loaded_from_memory(bundle: Path) -> None:
    with load_bundle(bundle, allow_unvalidated=True) as opened, opened.session(TARGET, threads=1) as session:
        expected = session.prefill([[1, 2, 3]])
    with load_bundle(bundle, allow_unvalidated=True) as opened:
        shutil.rmtree(bundle)
        with opened.session(TARGET, threads=1) as session:
            assert np.array_equal(session.prefill([[1, 2, 3]]), expected)


def test_weights_overwritten_while_they_are_loaded_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ort.load_held_graph

    def overwritten_first(graph: HeldGraph, load: Any, *, keep_mapped: bool) -> Any:
        other_weights(bundle / WEIGHTS)  # after it was hashed
        return original(graph, load, keep_mapped=keep_mapped)

    monkeypatch.setattr("crt_export.engine.ort.load_held_graph", overwritten_first)
    with (
        load_bundle(bundle, allow_unvalidated=True) as opened,
        pytest.raises(BundleError, match=r"fp32\.weights was changed while it was loaded"),
    ):
        opened.session(TARGET, threads=1)


@on_linux
def test_a_mapping_becomes_a_copy_and_those_of_before_stay(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "weights"
    path.parent.mkdir()
    content = np.random.default_rng(0).bytes(50_000)
    path.write_bytes(content)
    with path.open("r+b") as stream:
        file = stream.fileno()
        kept = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE)
        before = mappings_of(file)
        assert len(before) == 1
        copied = mmap.mmap(file, 20_000, flags=mmap.MAP_PRIVATE, offset=mmap.ALLOCATIONGRANULARITY)
        make_private(file, before)
        assert mappings_of(file) == before
        stream.write(bytes(50_000))
        stream.flush()
        assert bytes(copied) == content[mmap.ALLOCATIONGRANULARITY :][:20_000]
        assert bytes(kept[:100]) == bytes(100)
        path.write_bytes(b"")
        assert bytes(copied[-100:]) == content[mmap.ALLOCATIONGRANULARITY :][19_900:20_000]
        copied.close()
        kept.close()


@on_linux
def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(50_000))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ):
        os.truncate(path, 100)
        make_private(stream.fileno(), [])  # what is gone reads as zeros: the state of the file tells, see unchanged
        assert mappings_of(stream.fileno()) == []
