"""Text in, windows out; what is too short or foreign is refused with what is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.parity import ParityOptions
from crt_export.parity.windows import windows_from_text
from crt_export.text import TokenText, read_text, split_text
from crt_export.tokenizer import load_tokenizer

Config = Callable[..., ModelConfig]


def _read(config: ModelConfig, folder: Path, **source: Path) -> TokenText:
    return read_text(config, load_tokenizer(folder, config), **source)


def _text(count: int) -> TokenText:
    return TokenText(ids=np.arange(count, dtype=np.int64) % 251, source="counting")


def test_text_file_becomes_its_bytes_line_ends_included(tmp_path: Path, tiny_config: Config) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("a\r\nö".encode())
    read = _read(tiny_config(), tmp_path, text=path)
    assert read.ids.tolist() == [97, 13, 10, 195, 182]
    assert read.ids.dtype == np.int64


def test_default_text_is_long_enough_to_calibrate_and_validate(tmp_path: Path, tiny_config: Config) -> None:
    calibration, validation = split_text(_read(tiny_config(), tmp_path), calibrate=True)
    assert calibration is not None
    assert len(calibration) >= 4096
    assert len(validation) > 4096


def test_token_file_is_read_in_any_integer_type(tmp_path: Path, tiny_config: Config) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([0, 255, 7], np.uint16))
    read = _read(tiny_config(tokenizer="none"), tmp_path, tokens=path)
    assert (read.ids.tolist(), read.ids.dtype) == ([0, 255, 7], np.int64)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([1, 256]), r"outside the vocabulary \[0, 256\), the first is 256 at index 1"),
        (np.array([3, -1]), "outside the vocabulary"),
        (np.array([2**63 + 1], np.uint64), "outside the vocabulary"),
        (np.array([1.0]), "one-dimensional array of integers, found float64"),
        (np.array([[1]]), "one-dimensional array of integers"),
        (np.array([True]), "one-dimensional array of integers"),
        (np.array([], np.int64), "holds no tokens"),
        (np.array([{"a": 1}], dtype=object), "unreadable"),
    ],
)
def test_unusable_token_files_are_refused(tmp_path: Path, tiny_config: Config, array: np.ndarray, problem: str) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(InputError, match=problem):
        _read(tiny_config(), tmp_path, tokens=path)


def test_damaged_and_missing_files_are_refused(tmp_path: Path, tiny_config: Config) -> None:
    damaged = tmp_path / "damaged.npy"
    damaged.write_bytes(b"\x93NUMPY")
    archive = tmp_path / "archive.npz"
    np.savez(archive, a=np.arange(3))
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"abc\xff")
    for source in (
        {"tokens": damaged},
        {"tokens": tmp_path / "no.npy"},
        {"tokens": archive},
        {"text": tmp_path / "no.txt"},
    ):
        with pytest.raises(InputError):
            _read(tiny_config(), tmp_path, **source)
    with pytest.raises(InputError, match="invalid byte at offset 3"):
        _read(tiny_config(), tmp_path, text=latin)


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<u2", ">i4", "|i1"])
def test_ids_of_any_order_of_bytes(dtype: str, tmp_path: Path, tiny_config: Config) -> None:
    np.save(tmp_path / "tokens.npy", np.asfortranarray(np.array([0, 100, 7], dtype)))
    assert _read(tiny_config(), tmp_path, tokens=tmp_path / "tokens.npy").ids.tolist() == [0, 100, 7]


def test_every_damage_of_a_header_is_bad_input(tmp_path: Path, tiny_config: Config) -> None:
    """One byte of the header changed, each in turn, and the file cut off at every place: ids or an InputError."""
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(64))
    content = path.read_bytes()
    assert len(content) == 128 + 512
    damaged = [content[:at] + bytes([value]) + content[at + 1 :] for at in range(80) for value in b"\0(,'L\xff"]
    for case in [*damaged, *(content[:end] for end in range(0, len(content), 7)), content + b"more"]:
        path.write_bytes(case)
        if case[:128] == content[:128] and len(case) == len(content):
            continue
        try:
            ids = _read(tiny_config(), tmp_path, tokens=path).ids
        except InputError:
            continue
        assert len(ids) == 64  # a damage that leaves a header of 64 integers, such as another order of bytes


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (8192, , }", "unreadable"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (8192000000000,), }", "speaks of 8,192,000,000,000 ids"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (%s,), }" % ("9" * 4000), "unreadable"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (-8,), }", "unreadable"),
        ("(" * 9000, "unreadable"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (), }", "one-dimensional"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (8,), }", "unreadable"),
        ("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (8,), }", "one-dimensional array of integers"),
    ],
)
def test_a_header_that_claims_what_is_not_there(header: str, problem: str, tmp_path: Path, tiny_config: Config) -> None:
    path = tmp_path / "tokens.npy"
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(64))
    with pytest.raises(InputError, match=problem):
        _read(tiny_config(), tmp_path, tokens=path)


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
@pytest.mark.parametrize("source", ["text", "tokens"])
def test_what_is_no_file_is_refused_and_never_waited_for(source: str, tmp_path: Path, tiny_config: Config) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (2**33,)})
        stream.truncate(stream.tell() + 2**33)  # sparse: reading it would take minutes and gigabytes
    words = {"pipe": "a pipe", "/dev/zero": "a device", "": "a folder", "large": "at most 268,435,456|256 MiB"}
    for name, found in words.items():
        with pytest.raises(InputError, match=found):
            _read(tiny_config(), tmp_path, **{source: tmp_path / name})


def test_a_model_without_tokenizer_asks_for_tokens(tmp_path: Path, tiny_config: Config) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text")
    for source in ({}, {"text": path}):
        with pytest.raises(InputError, match=r"--tokens FILE\.npy"):
            _read(tiny_config(tokenizer="none"), tmp_path, **source)


def test_text_and_tokens_exclude_each_other(tmp_path: Path, tiny_config: Config) -> None:
    with pytest.raises(InputError, match="not both"):
        _read(tiny_config(), tmp_path, text=tmp_path, tokens=tmp_path)


@pytest.mark.parametrize(("count", "calibration"), [(8193, 4096), (20_000, 5000), (400_000, 32_768)])
def test_split_never_overlaps(count: int, calibration: int) -> None:
    first, second = split_text(_text(count), calibrate=True)
    assert first is not None
    assert len(first) == calibration
    assert (first.offset, second.offset) == (0, calibration)
    assert np.array_equal(np.concatenate([first.ids, second.ids]), _text(count).ids)


def test_split_without_calibration_validates_on_everything() -> None:
    calibration, validation = split_text(_text(5000), calibrate=False)
    assert calibration is None
    assert (len(validation), validation.offset) == (5000, 0)


@pytest.mark.parametrize(
    ("needs", "least"),
    [
        ({"calibrate": True}, 8193),
        ({"calibrate": True, "validate": False}, 4096),
        ({"calibrate": False}, 4097),
        ({"calibrate": False, "validation_tokens": 5000}, 5001),
        ({"calibrate": True, "validation_tokens": 5000}, 9097),
    ],
)
def test_split_says_how_much_text_is_needed(needs: dict[str, Any], least: int) -> None:
    with pytest.raises(InputError, match=f"{least - 1} tokens are too few: .* give at least {least}"):
        split_text(_text(least - 1), **needs)
    first, second = split_text(_text(least), **needs)
    assert (0 if first is None else len(first)) == (4096 if needs["calibrate"] else 0)
    assert len(second) == least - (4096 if needs["calibrate"] else 0)


def test_calibration_leaves_as_much_as_validation_asks_for() -> None:
    first, second = split_text(_text(40_000), calibrate=True, validation_tokens=35_000)
    assert first is not None
    assert (len(first), len(second)) == (4999, 35_001)


def test_windows_are_consecutive_and_predict_every_token_once() -> None:
    windows = windows_from_text(_text(5000), ParityOptions(), longest=1024, longest_reason="capacity")
    assert (windows.count, windows.length, windows.notes) == (16, 256, ())
    assert np.array_equal(windows.targets.ravel(), _text(5000).ids[1:4097])
    assert np.array_equal(windows.inputs.ravel(), _text(5000).ids[:4096])


def test_a_small_capacity_shortens_windows_and_says_so() -> None:
    windows = windows_from_text(_text(5000), ParityOptions(), longest=100, longest_reason="capacity of x is 100")
    assert (windows.length, windows.count) == (100, 41)
    assert windows.notes == ("windows of 100 tokens instead of 256: capacity of x is 100",)


def test_too_short_text_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match="16 windows of 256 tokens and one more to predict need 4097"):
        windows_from_text(_text(4096), ParityOptions(), longest=1024, longest_reason="")
    assert windows_from_text(_text(4097), ParityOptions(), longest=1024, longest_reason="").count == 16


def test_a_short_run_needs_a_reason_and_records_it() -> None:
    with pytest.raises(InputError, match="2 problems"):
        ParityOptions(validation_tokens=512, window=64)
    with pytest.raises(InputError, match=r"validation_tokens must be at least 4096, found 100: fewer say too little"):
        ParityOptions(validation_tokens=100)
    options = ParityOptions(validation_tokens=512, window=64, short_reason="size test")
    windows = windows_from_text(_text(600), options, longest=64, longest_reason="")
    assert windows.notes == ("8 windows of 64 tokens: size test",)


@pytest.mark.parametrize("change", [{"validation_tokens": 0}, {"window": 1}, {"window_batch": 0}, {"threads": -1}])
def test_impossible_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="parity options"):
        ParityOptions(**change, short_reason="test")
