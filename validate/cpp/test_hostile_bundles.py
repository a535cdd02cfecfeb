"""Python and C++ refuse the same hostile and damaged bundles, each with an error of the right kind that says why."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from crt_export.bundle.manifest import sealed
from crt_export.errors import BundleError
from crt_export.runtime import load_bundle

Manifest = dict[str, Any]
Change = Callable[[Path], object]

TARGET = "ort-cpu-fp32"
GRAPH = "graphs/prefill_pass.fp32.onnx"  # the one that a session on a CPU loads
WEIGHTS = "graphs/fp32.weights"


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "demo"))


# ---------------------------------------------------------------- hostile bundles


def manifest_bytes(edit: Callable[[bytes], bytes]) -> Change:
    def change(bundle: Path) -> None:
        path = bundle / "manifest.json"
        path.write_bytes(edit(path.read_bytes()))

    return change


def manifest(edit: Callable[[Manifest], object]) -> Change:
    def change(bundle: Path) -> None:
        path = bundle / "manifest.json"
        content = json.loads(path.read_text("utf-8"))
        edit(content)
        path.write_text(json.dumps(sealed(content)), "utf-8")

    return change


def listed(name: str, **entry: Any) -> Change:
    """Claim something about a file."""
    sound = {"size": 0, "sha256": "0" * 64}
    return manifest(lambda content: content["files"].update({name: content["files"].get(name, sound) | entry}))


def replaced(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """Another content that the manifest knows."""

    def change(bundle: Path) -> None:
        content = edit((bundle / name).read_bytes())
        (bundle / name).write_bytes(content)
        listed(name, size=len(content), sha256=hashlib.sha256(content).hexdigest())(bundle)

    return change


def with_location(location: str) -> Callable[[bytes], bytes]:
    """A graph whose first external tensor lies elsewhere."""

    def edit(content: bytes) -> bytes:
        model = onnx.ModelProto.FromString(content)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
        return model.SerializeToString()

    return edit


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def to_link(path: Path) -> None:
    path.rename(path.parent / "moved")
    path.symlink_to("moved")


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _set(*path: Any) -> Change:
    *keys, last, value = path

    def edit(content: Any) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return manifest(edit)


def _profile(key: str, value: Any) -> Change:
    return _set("targets", TARGET, "profile", key, value)


HOSTILE: dict[str, tuple[Change, str]] = {
    "manifest truncated": (manifest_bytes(lambda content: content[: len(content) // 2]), "is not JSON"),
    "manifest empty": (manifest_bytes(lambda content: b""), "is not JSON"),
    "manifest not UTF-8": (
        manifest_bytes(lambda content: content[:9] + b"\xff" + content[9:]),
        r"not UTF-8 \(byte 9\)",
    ),
    "manifest with byte order mark": (manifest_bytes(lambda content: b"\xef\xbb\xbf" + content), "is not JSON"),
    "key twice": (
        manifest_bytes(lambda content: b'{"schema_version": 1,' + content[1:]),
        "'schema_version' stands twice",
    ),
    "NaN": (manifest_bytes(lambda content: b'{"x": NaN,' + content[1:]), "is not JSON"),
    "infinite number": (manifest_bytes(lambda content: b'{"x": 1e999,' + content[1:]), "is not JSON"),
    "deep lists": (manifest_bytes(lambda content: b"[" * 1_000_000), "nested too deeply"),
    "deep unknown key": (_set("x", json.loads("[" * 200 + "]" * 200)), "nested too deeply"),
    "lone surrogate": (_set("x", "\ud800"), "is not JSON"),
    "no object": (manifest_bytes(lambda content: b"[]"), "must hold a JSON object"),
    "newer schema": (_set("schema_version", 2), "reads up to version 1: upgrade crt-export"),
    "schema no integer": (
        _set("schema_version", True),
        "expected an integer 'schema_version' of 1 or more, found True",
    ),
    "wrong schema": (_set("files", []), "'files' must be an object, found "),
    "file outside": (listed("../secret"), "component '..', which could lead out"),
    "file with absolute path": (listed("/etc/passwd"), "absolute path"),
    "file with backslash": (listed("graphs\\x"), "use '/' between folders"),
    "file with NUL": (listed("a\0b"), r"contains '\\x00'"),
    "negative size": (listed(WEIGHTS, size=-1), "'size' must be 0 or more, found -1"),
    "size with fraction": (listed(WEIGHTS, size=4096.0), "'size' must be an integer, found 4096.0"),
    "size is true": (listed(WEIGHTS, size=True), "'size' must be an integer, found True"),
    "huge size": (listed(WEIGHTS, size=2**63 - 1), "bytes, the manifest says 9223372036854775807"),
    "size beyond 64 bits": (listed(WEIGHTS, size=2**64), "beyond 64 bits"),
    "wrong digest": (listed(WEIGHTS, sha256="0" * 64), "has SHA-256 .*, the manifest says 0000"),
    "graph not listed": (
        _set("targets", TARGET, "graphs", "step", "x"),
        r"graphs\['step'\] is 'x', which is not listed",
    ),
    "plan not listed": (_set("quantization", "w8a8", "x"), r"quantization\['w8a8'\] is 'x', which is not listed"),
    "plan no name": (_set("quantization", "w8a8", {}), r"quantization\['w8a8'\] must be a file name"),
    "capacity of zero": (_set("targets", TARGET, "capacity", 0), "'capacity' must be 1 or more, found 0"),
    "cache of integers": (
        _set("targets", TARGET, "cache_dtype", "int64"),
        "'cache_dtype' must be 'float32' or 'float16'",
    ),
    "model without a vocabulary": (_set("model", "vocab", 0), "'vocab' must be 1 or more, found 0"),
    "end token outside": (_set("model", "eos_token_ids", [256]), r"a token must be in \[0, vocab = 256\), found 256"),
    "state that fills the memory": (_set("model", "states", 0, "shape", [2**20] * 3), "larger than any model's"),
    "state of another size": (_set("model", "states", 0, "shape", [7]), r"what the head reads, so its shape is \[32\]"),
    "states of one name": (
        manifest(lambda content: content["model"].update(states=2 * content["model"]["states"])),
        "two states have one name",
    ),
    "rotation that is not there": (_set("model", "caches", 0, "rotary", 9), "names rotation 9 of 1"),
    "rotation of other heads": (
        manifest(lambda content: content["model"]["rotaries"][0]["frequencies"].pop()),
        "its rotation not as many pairs",
    ),
    "model that is said not to iterate": (_set("model", "iterated", False), "iterated is False, its states say True"),
    "contract of other dims": (_set("contract", "step", "inputs", 0, "dims", ["batch", 2]), "contract is unusable"),
    "contract with true for 1": (_set("contract", "step", "inputs", 0, "dims", ["batch", True]), "is unusable"),
    "contract of another dtype": (_set("contract", "step", "inputs", 3, "dtype", "float16"), "contract is unusable"),
    "contract without a state": (manifest(lambda content: content["contract"]["step"]["outputs"].pop(3)), "unusable"),
    "contract with a tensor twice": (
        manifest(lambda content: content["contract"]["step"].update(inputs=2 * content["contract"]["step"]["inputs"])),
        "contract is unusable: .* step",
    ),
    "contract of other aliases": (_set("contract", "prefill", "aliases", []), "contract is unusable: .* prefill"),
    "contract of other continues": (_set("contract", "step", "continues", []), "contract is unusable: .* step"),
    "contract without a graph": (manifest(lambda content: content["contract"].pop("prefill_pass")), "prefill_pass"),
    "contract of an unknown graph": (
        manifest(lambda content: content["contract"].update(x=content["contract"]["step"])),
        "contract is unusable: .* x",
    ),
    "runtime is a list": (_profile("runtime", ["onnxruntime"]), "runtime must be one of"),
    "a million threads": (_profile("threads", 10**6), "at most 1024, found 1000000"),
    "optimizers that are no names": (_profile("options", {"disabled_optimizers": ["a;b"]}), "must be a list of names"),
    "unknown profile key": (_profile("thread", 1), r"unknown key 'thread' \(did you mean 'threads'\?\)"),
    "manifest is a link": (lambda bundle: to_link(bundle / "manifest.json"), "cannot read .*not a link"),
    "manifest is a pipe": (lambda bundle: to_pipe(bundle / "manifest.json"), "cannot read "),
    "manifest missing": (
        lambda bundle: (bundle / "manifest.json").unlink(),
        "is not a bundle: it has no manifest.json",
    ),
    "folder missing": (shutil.rmtree, "no such bundle folder"),
    "weights missing": (lambda bundle: (bundle / WEIGHTS).unlink(), f"'{WEIGHTS}' in .* is missing"),
    "weights tampered": (lambda bundle: flip(bundle / WEIGHTS), f"'{WEIGHTS}' in .* has SHA-256"),
    "weights truncated": (lambda bundle: os.truncate(bundle / WEIGHTS, 64), "has 64 bytes, the manifest says"),
    "weights are a link": (lambda bundle: to_link(bundle / WEIGHTS), f"goes through a link .'{WEIGHTS}'"),
    "weights are a pipe": (lambda bundle: to_pipe(bundle / WEIGHTS), "is not a regular file"),
    "folder is a link": (lambda bundle: to_link(bundle / "graphs"), r"goes through a link \('graphs'\)"),
    "graph tampered": (lambda bundle: flip(bundle / GRAPH), f"'{GRAPH}' in .* has SHA-256"),
    "graph is no graph": (
        replaced(GRAPH, lambda content: b"\x0b" + content),
        "not a usable ONNX file: unsupported wire",
    ),
    "graph claims too much": (replaced(GRAPH, lambda content: content[:-9]), "not a usable ONNX file: "),
    "external data outside": (replaced(GRAPH, with_location("../../secret")), "'../../secret', which contains .*'..'"),
    "external data absolute": (replaced(GRAPH, with_location("/dev/zero")), "'/dev/zero', which is an absolute path"),
    "external data not listed": (replaced(GRAPH, with_location("x")), "points at 'x', which is not listed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_both_refuse_a_hostile_bundle(case: str, bundle: Path, library: Any, c_library: ModuleType) -> None:
    change, message = HOSTILE[case]
    change(bundle)
    with pytest.raises(BundleError) as in_python, load_bundle(bundle, allow_unvalidated=True) as opened:
        opened.session(TARGET)
    with pytest.raises(c_library.CrtError) as in_cpp:
        library.bundle(bundle).session(TARGET)
    assert in_cpp.value.kind == "bundle"
    assert re.search(message, str(in_python.value), re.DOTALL), in_python.value
    for text in (str(in_python.value), in_cpp.value.message):  # each in its own words
        assert str(bundle) in text, text


def test_both_refuse_an_unvalidated_bundle_and_a_leftover(bundle: Path, library: Any, c_library: ModuleType) -> None:
    _set("validated", False)(bundle)
    leftover = bundle.with_name(".demo.partial-4194304")
    for path, message in ((bundle, "is not validated"), (leftover, "what an interrupted or running build left behind")):
        if path is leftover:
            bundle.rename(leftover)
        with pytest.raises(BundleError, match=message):
            load_bundle(path)
        with pytest.raises(c_library.CrtError, match=message) as refused:
            library.bundle(path, allow_unvalidated=False)
        assert refused.value.kind == "bundle"


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    """Truncations, changed bytes and changed values of a manifest, the same ones every time."""
    generator = random.Random(0)
    values = list(re.finditer(rb'"[^"\\]*"|-?\d[\d.eE+-]*|true|false|null', content))
    tokens = (b"null", b"true", b"-1", b"0", b"1.5", b"1e400", b"9223372036854775808", b'""', b"[]", b"{}", b'"\xff"')
    for index in range(count):
        if index % 4 == 0:
            yield content[: generator.randrange(len(content))]
        elif index % 4 == 1:
            changed = bytearray(content)
            changed[generator.randrange(len(content))] = generator.randrange(256)
            yield bytes(changed)
        else:
            found = generator.choice(values)
            yield content[: found.start()] + generator.choice(tokens) + content[found.end() :]


def refusal_in_python(bundle: Path) -> str | None:
    """The kind of the refusal; None where the bundle opens."""
    try:
        load_bundle(bundle, allow_unvalidated=True).close()
    except BundleError:
        return "bundle"
    return None


def refusal_in_cpp(bundle: Path, library: Any, c_library: ModuleType) -> str | None:
    """The kind of the refusal; None where the bundle opens."""
    try:
        library.bundle(bundle)
    except c_library.CrtError as refusal:
        return refusal.kind if refusal.message else "without a message"
    return None


def test_both_come_to_the_same_verdict_on_damaged_manifests(bundle: Path, library: Any, c_library: ModuleType) -> None:
    path = bundle / "manifest.json"
    whole = path.read_bytes()
    opened = 0
    for content in damaged(whole, 200):
        for written in (content, _sealed_again(content)):
            path.write_bytes(written)
            expected, found = refusal_in_python(bundle), refusal_in_cpp(bundle, library, c_library)
            assert found == expected
            assert written is not content or expected is not None or json.loads(content) == json.loads(whole)
            opened += written is not content and expected is None
    assert 1 < opened < 60


def _sealed_again(content: bytes) -> bytes:
    """The damaged manifest as if it had been written so; itself where it is none."""
    try:
        return json.dumps(sealed(json.loads(content))).encode()
    except (ValueError, AttributeError, TypeError):
        return content + b" "


def test_both_take_the_same_digests_of_every_kind_of_value(bundle: Path, library: Any, c_library: ModuleType) -> None:
    values = [
        None,
        True,
        False,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        0.0,
        -0.0,
        0.1,
        1e300,
        5e-324,
        "",
        '\0\n"\\/',
        "\u00e9\U0001f600",
    ]
    note = {"\u00e9": values, "e": {"\U0001f600": [], "\uffee": {}, "": [[values]]}, "Z": 1.0, "a": "1"}
    manifest(lambda content: content.update(note=note))(bundle)
    assert refusal_in_python(bundle) is None
    assert refusal_in_cpp(bundle, library, c_library) is None
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), sort_keys=True, ensure_ascii=False), "utf-8")
    assert refusal_in_python(bundle) is None  # digests are over values: another order and other escapes are the same
    assert refusal_in_cpp(bundle, library, c_library) is None


def test_both_refuse_another_identity_than_the_expected_one(bundle: Path, library: Any, c_library: ModuleType) -> None:
    with load_bundle(bundle, allow_unvalidated=True) as opened:
        identity = opened.identity
    library.bundle(bundle, identity=identity.encode())
    load_bundle(bundle, allow_unvalidated=True, identity=identity).close()
    with pytest.raises(BundleError) as python:
        load_bundle(bundle, allow_unvalidated=True, identity="0" * 64)
    with pytest.raises(c_library.CrtError) as cpp:
        library.bundle(bundle, identity=b"0" * 64)
    assert cpp.value.kind == "bundle"
    for text in (str(python.value), cpp.value.message):
        assert identity in text
    with pytest.raises(BundleError, match="expected the identity ''"):  # a setting that was lost is no "any"
        load_bundle(bundle, allow_unvalidated=True, identity="")
    with pytest.raises(c_library.CrtError, match="expected an identity, 64 hex digits"):
        library.bundle(bundle, identity=b"")
