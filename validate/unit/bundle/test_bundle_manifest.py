"""Every rule of manifest.json's schema is enforced when a bundle is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.bundle import open_bundle
from crt_export.bundle.paths import name_problem
from crt_export.errors import BundleError

Manifest = dict[str, Any]
Build = Callable[..., Path]
Edit = Callable[[Path, Callable[[Manifest], object]], None]


def test_missing_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", r"not UTF-8 \(byte 0\)"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"schema_version": 1, "schema_version": 1}', "stands twice"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"schema_version": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"a": 1e999}', "beyond the range of floats"),
        (b'{"a": 18446744073709551615}', "beyond 64 bits"),
        (b'{"a": "\\ud800"}', "not valid Unicode"),
        (b"{}", "expected an integer 'schema_version'"),
        (b'{"schema_version": true}', "expected an integer 'schema_version'"),
        (b'{"schema_version": "1"}', "expected an integer 'schema_version'"),
        (b'{"schema_version": 0}', "expected an integer 'schema_version'"),
        (b'{"schema_version": 2}', "reads up to version 1: upgrade crt-export"),
    ],
)
def test_unreadable_manifest(content: bytes, message: str, bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_newer_schema_is_reported_before_anything_else_in_it(bundle: Path, edit_manifest: Edit) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(schema_version=2, files=[], validated="yes"))
    with pytest.raises(BundleError, match=r"schema version 2; .* upgrade crt-export") as caught:
        open_bundle(bundle)
    assert "validated" not in str(caught.value)


def test_manifest_that_is_a_link_or_a_pipe_or_huge(bundle: Path) -> None:
    path = bundle / "manifest.json"
    elsewhere = bundle.parent / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(BundleError, match=r"cannot read .*manifest\.json"):
        open_bundle(bundle)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match=r"cannot read .*manifest\.json"):
        open_bundle(bundle)
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole, no room taken
    with pytest.raises(BundleError, match="a manifest has at most"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "key",
    [
        "tool",
        "libraries",
        "validated",
        "config",
        "model",
        "checkpoint",
        "options",
        "contract",
        "graphs",
        "quantization",
        "targets",
        "files",
        "parity",
    ],
)
@pytest.mark.parametrize("change", ["missing", "mistyped"])
def test_each_key_is_required_and_typed(key: str, change: str, bundle: Path, edit_manifest: Edit) -> None:
    def apply(manifest: Manifest) -> None:
        if change == "missing":
            del manifest[key]
        else:
            manifest[key] = 7

    edit_manifest(bundle, apply)
    with pytest.raises(BundleError, match=f"lacks '{key}'" if change == "missing" else f"'{key}' must be"):
        open_bundle(bundle)


def _set(*path: Any) -> Callable[[Manifest], None]:
    *keys, last, value = path

    def apply(manifest: Any) -> None:
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return apply


FILE = {"size": 0, "sha256": "0" * 64}
STATE = {"name": "hidden", "shape": [4], "dtype": "float32"}
CACHE = {"name": "layers.0", "heads": 1, "query_heads": 1, "head_dim": 4, "window": None, "rotary": None}
INNER = [
    (_set("tool", "name", "other"), "tool.name must be 'crt-export'"),
    (_set("checkpoint", {}), "checkpoint lacks 'sha256'"),
    (_set("parity", None), "no parity report that passed"),
    (_set("parity", "passed", False), "no parity report that passed"),
    (_set("parity", "passed", None), "no parity report that passed"),
    (_set("parity", "passed", 1), "no parity report that passed"),
    (_set("parity", {}), "no parity report that passed"),
    (_set("graphs", 0, []), r"graphs\[0\] must be an object"),
    (_set("graphs", 0, "weights", "graphs/absent"), "'graphs/absent', which is not listed in 'files'"),
    (_set("graphs", 0, "quantized_matmuls", True), "'quantized_matmuls' must be an integer, found True"),
    (_set("quantization", "w8a8", "graphs/absent"), r"quantization\['w8a8'\] is 'graphs/absent', which is not listed"),
    (_set("quantization", "w8a8", {}), r"quantization\['w8a8'\] must be a file name"),
    (_set("graphs", 0, "roles", []), "'roles' must be some of session, compiler, interchange, validation, found"),
    (_set("graphs", 0, "roles", ["session", "spare"]), "'roles' must be some of session, compiler, interchange"),
    (_set("targets", "t", {}), r"targets\['t'\] lacks 'profile'"),
    (
        _set("targets", "ort-cpu-fp32", "engines", "step", "x"),
        r"engines\['step'\] is 'x', which is not listed",
    ),
    (_set("targets", "ort-cpu-fp32", "graphs", "step", 3), r"graphs\['step'\] must be a file name"),
    (_set("targets", "ort-cpu-fp32", "capacity", 0), "'capacity' must be 1 or more, found 0"),
    (_set("targets", "ort-cpu-fp32", "unroll", -8), "'unroll' must be 1 or more, found -8"),
    (_set("targets", "ort-cpu-fp32", "cache_dtype", "int8"), "'cache_dtype' must be 'float32' or 'float16'"),
    (_set("contract", "step", 1), r"contract\['step'\] must be an object"),
    (_set("contract", "step", "inputs", [1]), r"inputs\[0\] must be an object"),
    (_set("contract", "step", "aliases", [["a"]]), r"aliases\[0\] must be a pair"),
    (_set("contract", "step", "continues", [["a", "b"], "ab"]), r"continues\[1\] must be a pair"),
    (_set("files", "report.md", "size", -1), "'size' must be 0 or more"),
    (_set("files", "report.md", "size", 1.5), "'size' must be an integer"),
    (_set("files", "report.md", "sha256", "A" * 64), "64 lower-case hex digits"),
    (_set("files", "report.md", None), r"files\['report.md'\] must be an object"),
    (_set("files", "/etc/passwd", FILE), "absolute path"),
    (_set("files", "../secret", FILE), r"component '\.\.'"),
    (_set("files", "graphs/../../secret", FILE), r"component '\.\.'"),
    (_set("files", "graphs//x", FILE), "component ''"),
    (_set("files", "./x", FILE), r"component '\.'"),
    (_set("files", "", FILE), "must have 1 to"),
    (_set("files", "graphs\\x", FILE), "use '/' between folders"),
    (_set("files", "C:x", FILE), "no drive letter"),
    (_set("files", "a\0b", FILE), "control character"),
    (_set("files", "\ud800", FILE), "not valid Unicode"),
    (_set("files", "x" * 2000, FILE), "must have 1 to 1024"),
    (_set("files", "x. ", FILE), "ends in a dot or a space"),
    (_set("files", "manifest.json", FILE), "cannot list itself"),
    (_set("model", {}), "model lacks 'architecture'"),
    (_set("model", "iterated", 1), "'iterated' must be"),
    (_set("model", "vocab", 0), "model: 'vocab' must be 1 or more, found 0"),
    (_set("model", "passes", 2**31), "model: 'passes' must be 1 or more, found 2147483648"),
    (_set("model", "bos_token_id", 4), r"a token must be in \[0, vocab = 4\), found 4"),
    (_set("model", "eos_token_ids", [3, True]), r"a token must be in \[0, vocab = 4\), found True"),
    (_set("model", "states", [{}]), r"model\.states\[0\] lacks 'name'"),
    (_set("model", "states", [{**STATE, "name": "../x"}]), r"states\[0\]: expected a plain name and float32"),
    (_set("model", "states", [{**STATE, "dtype": "float16"}]), r"states\[0\]: expected a plain name and float32"),
    (_set("model", "states", [{**STATE, "shape": [4, 0]}]), r"'shape' must be sizes of 1 or more, found \[4, 0\]"),
    (_set("model", "states", [{**STATE, "shape": [2**16, 2**15]}]), "'shape' is larger than any model's"),
    (_set("model", "caches", [CACHE, {**CACHE, "window": 0}]), r"caches\[1\]: sizes must be 1 or more"),
    (_set("model", "caches", [{**CACHE, "heads": 2**20, "head_dim": 2**11}]), r"caches\[0\]: sizes must be"),
    (_set("model", "caches", [CACHE] * 65537), "model.caches holds 65537, at most 65536 are possible"),
    (_set("model", "rotaries", [{"layout": "odd", "frequencies": [1.0]}]), r"rotaries\[0\]: expected a layout"),
    (_set("model", "rotaries", [{"layout": "half", "frequencies": ["1"]}]), r"rotaries\[0\]: expected a layout"),
]


@pytest.mark.parametrize(("change", "message"), INNER, ids=[message for _, message in INNER])
def test_each_rule_of_the_schema(
    change: Callable[[Manifest], None], message: str, bundle: Path, edit_manifest: Edit
) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_all_schema_problems_are_reported_at_once(bundle: Path, edit_manifest: Edit) -> None:
    edit_manifest(bundle, lambda manifest: [change(manifest) for change, _ in (INNER[0], INNER[5], INNER[17])])
    with pytest.raises(BundleError, match="3 problems"):
        open_bundle(bundle)


def test_unknown_keys_are_allowed(bundle: Path, edit_manifest: Edit) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(note="added by a later 0.x"))
    open_bundle(bundle)


DEVICE, ASCII, CASE = "which is a device on Windows", "only those of ASCII", "differ in upper and lower case only"
NAMES: list[tuple[list[str], str]] = [
    (["graphs/NUL"], DEVICE),
    (["con.txt"], DEVICE),
    (["a/Com1.tar.gz"], DEVICE),
    (["lpt9 .x"], DEVICE),
    (["CONIN$"], DEVICE),
    (["aux/file"], DEVICE),
    (["COM\u00b9"], ASCII),
    (["graphs/\u00e9"], ASCII),
    (["graphs/e\u0301"], ASCII),
    (["graphs/\x9b31m"], r"contains '\\x9b'"),
    (["a\x7fb"], r"contains '\\x7f'"),
    (["graphs/A.bin", "graphs/a.bin"], CASE),
    (["Other/x", "other/y"], "'Other' and 'other' differ"),
    (["x" * 256], "contains a component of 256 characters"),
    *((["a" + character], "contains") for character in '<>:"|?*\\'),
    (["a "], "ends in a dot or a space"),
]


@pytest.mark.parametrize(("names", "message"), NAMES, ids=[ascii(names)[:40] for names, _ in NAMES])
def test_names_that_do_not_mean_the_same_everywhere_are_refused(
    names: list[str], message: str, bundle: Path, edit_manifest: Edit
) -> None:
    edit_manifest(bundle, lambda manifest: manifest["files"].update(dict.fromkeys(names, FILE)))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_names_that_only_look_like_devices_are_allowed() -> None:
    assert [name_problem(name) for name in ("console/com.txt", "com10", "nul-1", "a b", "~x!$&'()+,;=@[]^`{}")] == [
        None
    ] * 5
