"""No bit of manifest.json flips unnoticed, and a tool that repairs a bundle need not know its digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.bundle import open_bundle
from crt_export.bundle.manifest import canonical, integrity_problem, sealed
from crt_export.errors import BundleError

Build = Callable[..., Path]


def flip_bits(bundle: Path, step: int) -> tuple[int, int]:
    """Flip single bits of the manifest, one at a time; how many were refused, and how many changed no value."""
    path = bundle / "manifest.json"
    content = path.read_bytes()
    values = canonical(json.loads(content))
    refused = harmless = 0
    for bit in range(0, 8 * len(content), step):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            open_bundle(bundle).close()
        except BundleError:
            refused += 1
        else:
            assert canonical(json.loads(flipped)) == values, f"bit {bit % 8} of byte {bit // 8}"
            harmless += 1
    return refused, harmless


def test_flipped_bits_are_refused(bundle: Path) -> None:
    refused, harmless = flip_bits(bundle, 23)
    assert refused > 10 * harmless


@pytest.mark.evidence
def test_every_flipped_bit_is_refused(bundle: Path) -> None:
    refused, harmless = flip_bits(bundle, 1)
    assert refused > 10 * harmless


def test_a_changed_digit_is_refused_in_so_many_words(bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["targets"]["ort-cpu-fp32"]["unroll"] = 1
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=r"was changed after it was written: its content has the digest [0-9a-f]{64}"):
        open_bundle(bundle)


@pytest.mark.parametrize("found", [None, {}, {"manifest": "0"}, {"manifest": 1, "files": 2, "more": 3}, "0"])
def test_a_manifest_without_its_digests_is_refused(found: Any, bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "integrity": found}), "utf-8")
    with pytest.raises(BundleError, match="expected an object 'integrity' with the digests 'manifest' and 'files'"):
        open_bundle(bundle)


def test_digests_are_over_values(bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(manifest, sort_keys=True, indent=7, ensure_ascii=True), "utf-8")
    open_bundle(bundle).verify_all()


def test_canonical_bytes() -> None:
    value = {"b": [None, True, False, -12, 0.5, -0.0, 1e3], "a\u00e9": "\u00e9/", "a": {}}
    assert canonical(value) == (
        b"o1:aoe3:a\xc3\xa93:\xc3\xa9/1:blntfi-12ed3fe0000000000000d8000000000000000d408f400000000000ee"
    )


def test_sealing_twice_changes_nothing() -> None:
    once = sealed({"a": 1, "files": {}})
    assert sealed(once) == once
    assert integrity_problem(once) is None


# ---------------------------------------------------------------- a table of files that was written anew


def list_again(bundle: Path) -> None:
    """What a tool that repairs a bundle does: list the files as they are, write the manifest in another form."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    files = [file for file in sorted(bundle.rglob("*")) if file.is_file() and file != path]
    manifest["files"] = {
        file.relative_to(bundle).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    path.write_text(json.dumps(manifest), "utf-8")


def test_a_table_that_every_file_proves_is_believed(bundle: Path) -> None:
    (bundle / "report.md").write_text("repaired", "utf-8")
    list_again(bundle)
    assert open_bundle(bundle).content("report.md") == b"repaired"


def test_a_table_that_a_file_disproves_is_refused_at_once(bundle: Path) -> None:
    (bundle / "report.md").write_text("repaired", "utf-8")
    list_again(bundle)
    weights = bytearray((bundle / "graphs/fp32.weights").read_bytes())
    weights[0] ^= 1
    (bundle / "graphs/fp32.weights").write_bytes(weights)
    with pytest.raises(BundleError, match=r"'graphs/fp32\.weights' has SHA-256"):
        open_bundle(bundle)


def test_a_table_that_leaves_a_file_out_is_refused(bundle: Path) -> None:
    (bundle / "report.md").write_text("repaired", "utf-8")
    list_again(bundle)
    (bundle / "extra").write_bytes(b"")
    with pytest.raises(BundleError, match=r"'extra' is not listed in manifest\.json"):
        open_bundle(bundle)
