"""A bundle stays what it was when it was opened, whatever happens to its folder and its names."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crt_export.bundle import open_bundle
from crt_export.bundle import read as reading
from crt_export.bundle.exchange import exchange_folders
from crt_export.bundle.held import HOLDS_FOLDERS, HeldFolder
from crt_export.errors import BundleError

Build = Callable[..., Path]

pytestmark = pytest.mark.skipif(not HOLDS_FOLDERS, reason="this system cannot hold folders open")


@pytest.fixture
def other(tmp_path: Path, build: Build) -> Path:
    """Another bundle, to take the place of the first one."""
    return build(tmp_path / "other", content="other")


def test_an_exchanged_bundle_reads_as_it_was_opened(bundle: Path, other: Path) -> None:
    opened = open_bundle(bundle)
    if not exchange_folders(bundle, other):
        pytest.skip("this file system cannot exchange folders")
    assert opened.content("report.md") == b"first"
    graph = opened.held_graph("graphs/step.fp32.onnx")
    assert (graph.folder / "fp32.weights").samefile(other / "graphs" / "fp32.weights")
    for call in (opened.verify_all, opened.check_unchanged, lambda: opened.file("report.md")):
        with pytest.raises(BundleError, match="was replaced since it was opened"):
            call()
    again = open_bundle(bundle)
    assert again.content("report.md") == b"other"
    assert again.identity != opened.identity


def test_a_removed_bundle_reads_as_it_was_opened(bundle: Path) -> None:
    opened = open_bundle(bundle)
    shutil.rmtree(bundle)
    assert opened.content("report.md") == b"first"
    graph = opened.held_graph("graphs/step.fp32.onnx")
    assert len(graph.weights["fp32.weights"].private_copy()) == 64


def test_a_bundle_exchanged_between_manifest_and_files_is_opened_once_more(
    bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reading.read_manifest_and_identity
    read = []

    def then_replaced(folder: HeldFolder) -> tuple[dict, str]:
        found = original(folder)
        if not read:  # as a build does: exchange, then remove the old folder
            shutil.rmtree(bundle)
            other.rename(bundle)
        read.append(found[1])
        return found

    monkeypatch.setattr(reading, "read_manifest_and_identity", then_replaced)
    opened = open_bundle(bundle)
    assert opened.content("report.md") == b"other"
    assert opened.identity == read[1] != read[0]


def test_content_overwritten_in_place_is_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.content("report.md") == b"first"
    (bundle / "report.md").write_bytes(b"FIRST")
    with pytest.raises(BundleError, match="has SHA-256"):
        opened.content("report.md")


def test_a_private_copy_of_weights_that_changed_meanwhile_is_refused(bundle: Path) -> None:
    weights = open_bundle(bundle).held_graph("graphs/step.fp32.onnx").weights["fp32.weights"]
    assert weights.unchanged
    (bundle / "graphs" / "fp32.weights").write_bytes(bytes(64))
    assert not weights.unchanged
    with pytest.raises(BundleError, match=r"fp32\.weights was changed while it was loaded"):
        weights.private_copy()


def test_a_closed_bundle_reads_nothing_and_holds_no_descriptor(bundle: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened = open_bundle(bundle)
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    opened.close()
    opened.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    for call in (opened.verify_all, lambda: opened.content("report.md"), lambda: opened.file("report.md")):
        with pytest.raises(BundleError, match="the bundle is closed"):
            call()
    open_bundle(bundle)  # nobody keeps it
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_too_few_descriptors_are_said_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = HeldFolder.open_file

    def few(folder: HeldFolder, name: str) -> int:
        if name == "manifest.json":
            return original(folder, name)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(HeldFolder, "open_file", few)
    with pytest.raises(BundleError, match=r"cannot be held open \(Too many open files\).*ulimit -n"):
        open_bundle(bundle)


def test_another_identity_than_the_expected_one_is_refused(bundle: Path, other: Path) -> None:
    identity = open_bundle(bundle).identity
    assert open_bundle(bundle, identity=identity).identity == identity
    with pytest.raises(BundleError, match=f"expected the identity '{identity}'.*found {open_bundle(other).identity}"):
        open_bundle(other, identity=identity)
