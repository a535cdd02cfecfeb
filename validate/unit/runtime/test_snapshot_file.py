"""The snapshot file: a format held by its bytes, and files that are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import BundleError, InputError
from crt_export.runtime.snapshot import Snapshot

Header = dict[str, Any]


@pytest.fixture
def snapshot() -> Snapshot:
    """A few small tensors; what they mean is restore()'s business."""
    return Snapshot(
        bundle="b" * 64,
        target="ort-cpu-fp32",
        tensors={
            "position": np.array([2, 0], np.int64),
            "seen": np.array([[1, 0, 1], [0, 0, 0]], np.uint8),
            "logits": np.array([[1.5, -2, 3], [np.nan] * 3], np.float32),
            "past_key_values.0.key": np.arange(8, dtype=np.float16).reshape(2, 1, 2, 2),
        },
    )


@pytest.fixture
def file(snapshot: Snapshot, tmp_path: Path) -> Path:
    snapshot.save(tmp_path / "a.snapshot")
    return tmp_path / "a.snapshot"


def parts(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(file: Path, header: Header | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_file_is_safetensors_with_this_metadata(snapshot: Snapshot, file: Path) -> None:
    """Read with nothing but json: another language has to find the same."""
    header, data = parts(file)
    metadata = header.pop("__metadata__")
    names = {"F16": "<f2", "F32": "<f4", "I64": "<i8", "U8": "u1"}
    raw = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw[name] = data[begin:end]
        found = np.frombuffer(raw[name], names[entry["dtype"]]).reshape(entry["shape"])
        np.testing.assert_array_equal(found, snapshot.tensors[name])
    assert header.keys() == snapshot.tensors.keys()
    assert metadata == {
        "format": "crt-export snapshot",
        "format_version": "1",
        "bundle": "b" * 64,
        "target": "ort-cpu-fp32",
        "sha256": hashlib.sha256(b"".join(raw[name] for name in sorted(raw))).hexdigest(),
    }


def test_a_loaded_file_is_the_snapshot(snapshot: Snapshot, file: Path) -> None:
    found = Snapshot.load(file)
    assert (found.bundle, found.target) == (snapshot.bundle, snapshot.target)
    assert found.tensors.keys() == snapshot.tensors.keys()
    for name, values in snapshot.tensors.items():
        assert found.tensors[name].dtype == values.dtype
        np.testing.assert_array_equal(found.tensors[name], values)


def test_saving_replaces_in_one_step_and_leaves_nothing_beside_it(snapshot: Snapshot, file: Path) -> None:
    other = dataclasses.replace(snapshot, target="ort-cpu-int8")
    other.save(str(file))
    assert Snapshot.load(file).target == "ort-cpu-int8"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_save_that_fails_keeps_the_old_file(snapshot: Snapshot, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write the snapshot .*a\.snapshot: No space left on device"):
        snapshot.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_path_with_a_nul_byte_names_no_file(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "a\0b"
    with pytest.raises(InputError, match=r"cannot write the snapshot '.*a\\x00b': a path must not hold a NUL byte"):
        snapshot.save(path)
    with pytest.raises(BundleError, match=r"found a path with a NUL byte: '.*a\\x00b'"):
        Snapshot.load(path)


def test_a_folder_that_is_not_there_is_an_input_error(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the snapshot"):
        snapshot.save(tmp_path / "absent" / "a.snapshot")


def metadata(**changes: str | None) -> Callable[[Header], Header]:
    def change(header: Header) -> Header:
        merged = {**header["__metadata__"], **changes}
        return {**header, "__metadata__": {key: value for key, value in merged.items() if value is not None}}

    return change


def tensor(name: str, **changes: Any) -> Callable[[Header], Header]:
    return lambda header: {**header, name: {**header[name], **changes}}


CHANGED_HEADERS: dict[str, tuple[Callable[[Header], Header], str]] = {
    "other format": (metadata(format="model"), "its format is 'model'"),
    "no metadata": (lambda h: {k: v for k, v in h.items() if k != "__metadata__"}, "its format is None"),
    "newer": (metadata(format_version="2"), "format version 2; this version reads up to 1: upgrade crt-export"),
    "far newer": (metadata(format_version="9" * 5000), "format version 99999.*upgrade crt-export"),
    "version zero": (metadata(format_version="0"), "its format version is '0'"),
    "version words": (metadata(format_version="one"), "its format version is 'one'"),
    "no bundle": (metadata(bundle=None), "its metadata lack bundle"),
    "no checksum": (metadata(sha256=None, target=None), "its metadata lack target, sha256"),
    "wrong checksum": (metadata(sha256="0" * 64), "is damaged: its tensors have SHA-256 .* say '0000"),
    "other dtype": (tensor("position", dtype="F64"), "position is F64; a snapshot has I64, F32, F16, U8 only"),
    "bfloat16": (tensor("past_key_values.0.key", dtype="BF16"), "key is BF16"),
    "huge shape": (tensor("seen", shape=[2**40, 2**40]), "not a snapshot or damaged"),
    "negative size": (tensor("seen", shape=[-1, 3]), "not a snapshot or damaged"),
    "past the end": (tensor("seen", shape=[200, 3], data_offsets=[0, 600]), "not a snapshot or damaged"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED_HEADERS.values(), ids=CHANGED_HEADERS)
def test_a_changed_header_is_refused(file: Path, change: Callable[[Header], Header], message: str) -> None:
    header, data = parts(file)
    write(file, change(header), data)
    with pytest.raises(BundleError, match=message):
        Snapshot.load(file)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BundleError, match="is not a snapshot or damaged"):
        Snapshot.load(file)


def test_a_flipped_bit_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"a\.snapshot is damaged: its tensors have SHA-256"):
        Snapshot.load(file)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 6) + b"{}" + b" " * 4 + b"tail",
    ],
    ids=["noise", "header of 2**63", "header of 200 MB", "no UTF-8", "no object", "bytes nobody owns"],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BundleError, match="is not a snapshot"):
        Snapshot.load(tmp_path / "x")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"")
    with pytest.raises(BundleError, match="is not a snapshot"):
        Snapshot.load(tmp_path / "x")


def test_nothing_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a snapshot file, found nothing"):
        Snapshot.load(tmp_path / "absent")
    with pytest.raises(BundleError, match="expected a snapshot file, found a folder"):
        Snapshot.load(tmp_path)


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_file_name_is_refused(snapshot: Snapshot, path: str) -> None:
    with pytest.raises(InputError, match="expected a file name to write the snapshot to"):
        snapshot.save(path)


@pytest.mark.parametrize("path", ["\ud800", None, b"x"], ids=["lone surrogate", "None", "bytes"])
def test_what_cannot_be_a_path_is_refused(snapshot: Snapshot, path: Any) -> None:
    with pytest.raises(InputError, match="expected the path of a snapshot file"):
        snapshot.save(path)
    with pytest.raises(BundleError, match="expected the path of a snapshot file"):
        Snapshot.load(path)


@pytest.mark.parametrize("change", [{"bundle": None}, {"target": 5}, {"tensors": None}, {"tensors": [1]}])
def test_a_snapshot_of_other_types_cannot_be_made(snapshot: Snapshot, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"(bundle|target) must be text|tensors must map names to arrays"):
        dataclasses.replace(snapshot, **change)


@pytest.mark.parametrize("digest", ["0" * 64, "of zeros"])
def test_a_file_that_claims_much_and_holds_nothing_costs_nothing(digest: str, tmp_path: Path) -> None:
    """300 MiB of zeros without room on the disk: refused in little memory, or read into as much as the file has."""
    size = 300 << 20
    if digest == "of zeros":
        zeros, found = bytes(1 << 20), hashlib.sha256()
        for _ in range(size >> 20):
            found.update(zeros)
        digest = found.hexdigest()
    fields = {"format": "crt-export snapshot", "format_version": "1", "bundle": "x", "target": "y", "sha256": digest}
    seen = {"dtype": "U8", "shape": [1, size], "data_offsets": [0, size]}
    header = {"__metadata__": fields, "seen": seen}
    path = tmp_path / "bomb"
    write(path, header, b"")
    os.truncate(path, path.stat().st_size + size)
    assert path.stat().st_blocks * 512 < 1 << 16
    script = (
        "import resource, sys\n"
        "from crt_export.errors import BundleError\n"
        "from crt_export.runtime import Snapshot\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: Snapshot.load(sys.argv[1])\n"
        "except BundleError as error: assert 'is damaged' in str(error), error\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < (40 if digest == "0" * 64 else 340)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a", np.zeros(1, np.uint8), "'a' is unknown"),
        ("past_key_values.0.query", np.zeros((2, 1, 2, 2), np.float16), "'past_key_values.0.query' is unknown"),
        ("logits", np.zeros((2, 3), np.float16), r"logits must be float32 \[2, 3\], found float16 \[2, 3\]"),
        ("logits", np.zeros((2, 4), np.float32), r"seen must be uint8 \[2, 4\], found uint8 \[2, 3\]"),
        ("recent", np.zeros((2, 9), np.int64), r"recent must be int64 \[2, 1024\], found int64 \[2, 9\]"),
        (
            "state",
            np.zeros((2, 8), np.float32),
            r"state must be float32 \[2, 1, dim 2\], found float32 \[2, 8\]",
        ),
        (
            "past_key_values.0.value",
            np.zeros((2, 1, 3, 2), np.float16),
            r"past_key_values.0.value must be .*2, 1, 2, 2",
        ),
        ("drawn", np.zeros(3, np.int64), r"position must be int64 \[3\], found int64 \[2\]"),
    ],
)
def test_tensors_that_no_session_has_are_refused_unread(
    snapshot: Snapshot, file: Path, name: str, values: np.ndarray, message: str
) -> None:
    """Also with the right checksum; here it is the wrong one, which would be said if they had been read."""
    dataclasses.replace(snapshot, tensors={**snapshot.tensors, name: values}).save(file)
    header, data = parts(file)
    header["__metadata__"]["sha256"] = "0" * 64
    write(file, header, data)
    with pytest.raises(BundleError, match=f"is not a snapshot of a session(.|\n)*{message}"):
        Snapshot.load(file)
