"""Opening a bundle to run it: what is imported when, what is shared, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle.manifest import sealed
from crt_export.errors import BundleError, ContractError, InputError, MissingDependencyError, UnsupportedError
from crt_export.runtime import load_bundle

TARGET = "ort-cpu-fp32"


@pytest.fixture
def copied(crt_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(crt_path, tmp_path / "bundle"))


def test_nothing_heavy_is_imported_before_a_session_is_opened(crt_path: Path) -> None:
    code = f"""
import sys
from crt_export import load_bundle
bundle = load_bundle({str(crt_path)!r}, allow_unvalidated=True)
bundle.tokenizer.encode("a")
heavy = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "tokenizers", "click")
print([name for name in heavy if name in sys.modules])
bundle.session({TARGET!r}).prefill([[40]])
print([name for name in heavy if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "['onnxruntime']"]


def test_the_package_offers_the_runtime_at_its_top() -> None:
    import crt_export

    assert crt_export.load_bundle is load_bundle


def test_an_unvalidated_bundle_is_refused_unless_asked_for(copied: Path) -> None:
    with pytest.raises(BundleError, match="not validated"):
        load_bundle(copied)


@pytest.mark.parametrize("file", ["graphs/prefill_pass.fp32.onnx", "graphs/fp32.weights"])
def test_a_tampered_file_is_refused_before_a_runtime_opens_it(copied: Path, file: str) -> None:
    path = copied / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with (
        load_bundle(copied, allow_unvalidated=True) as bundle,
        pytest.raises(BundleError, match=f"{file}.*SHA-256"),
    ):
        bundle.session(TARGET)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", None, 5], ids=["NUL", "lone surrogate", "None", "number"])
def test_what_cannot_be_a_path_is_a_bundle_error(path: Any) -> None:
    with pytest.raises(BundleError, match="expected the path of a bundle folder, found"):
        load_bundle(path)


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"hidden": "wide"}, "'hidden' must be an integer, found 'wide'"),
    ({"hidden": 33}, "contract is unusable: of its model it is not for prefill, prefill_pass, step"),
    ({"states": []}, "model is unusable: iterated is True, its states say False"),
    ({"states": [{"name": "hidden", "shape": [32], "dtype": "float32"}] * 2}, "model is unusable: two states have one"),
    ({"rotaries": []}, r"model is unusable: cache 'layers\.0' names rotation 0 of 0"),
    (
        {"rotaries": [{"layout": "half", "frequencies": [1.0]}]},
        r"model is unusable: cache 'layers\.0' has heads of 8, its rotation not as many pairs",
    ),
]


@pytest.mark.parametrize(("change", "message"), UNUSABLE, ids=[message for _, message in UNUSABLE])
def test_a_model_that_this_version_cannot_run_is_a_bundle_error(
    copied: Path, change: dict[str, Any], message: str
) -> None:
    edit_manifest(copied, lambda manifest: manifest["model"].update(change))
    with pytest.raises(BundleError, match=message):
        load_bundle(copied, allow_unvalidated=True)


def test_what_a_later_version_says_about_a_model_is_ignored(copied: Path) -> None:
    def add(manifest: dict[str, Any]) -> None:
        for entry in (manifest["model"], *(manifest["model"][key][0] for key in ("states", "caches", "rotaries"))):
            entry["note"] = "added by a later 0.x"

    edit_manifest(copied, add)
    load_bundle(copied, allow_unvalidated=True).close()


def test_a_graph_that_breaks_the_contract_is_refused(crt: Any) -> None:
    with pytest.raises(ContractError, match=r"prefill_pass: input past_key_values\.0\.key.*float16"):
        crt.bundle.session("broken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "ort-cpu-fp99"}, "unknown target 'ort-cpu-fp99'.*ort-cpu-fp32, chunked"),
        ({"target": TARGET, "batch": 0}, "batch must be at least 1, found 0"),
        ({"target": TARGET, "batch": 1.5}, "batch must be a whole number"),
        ({"target": TARGET, "batch": True}, "batch must be a whole number"),
        ({"target": TARGET, "batch": np.array([1, 2])}, r"batch must be a whole number, found array\(\[1, 2\]\)"),
        ({"target": TARGET, "batch": -(10**5000)}, "batch must be at least 1, found a number of more than 4300 digits"),
        ({"target": ["x"]}, r"unknown target \['x'\]"),
        ({"target": TARGET, "batch": 2**40}, "needs more memory than there is|compiled for a batch of at most"),
        ({"target": TARGET, "capacity": 0}, "capacity must be at least 1 and at most 64"),
        ({"target": TARGET, "capacity": 65}, "at most 64 .what ort-cpu-fp32 was built for; a build with .* found 65"),
        ({"target": TARGET, "threads": -1}, "threads must be at least 0 and at most 1024, found -1"),
        ({"target": TARGET, "threads": 1025}, "threads must be at least 0 and at most 1024, found 1025"),
    ],
)
def test_impossible_sessions_are_refused(crt: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        crt.bundle.session(**arguments)


def test_a_compiled_target_says_that_it_cannot_run_here(crt: Any) -> None:
    with pytest.raises(MissingDependencyError, match="running rtx-sm80-fp16 needs what this machine lacks"):
        crt.bundle.session("rtx-sm80-fp16")


def test_the_default_capacity_is_what_it_was_built_for_and_less_can_be_had(crt: Any) -> None:
    assert crt.bundle.session(TARGET).capacity == 64
    assert crt.bundle.session(TARGET, capacity=48).capacity == 48
    assert crt.bundle.default_target() == TARGET


def test_capacity_does_not_change_the_logits(either: Any) -> None:
    prompt = [40, 41, 42, 43]
    small, large = (either.bundle.session(TARGET, capacity=size).prefill([prompt]) for size in (4, 64))
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-5)


def test_sessions_share_graphs_and_nothing_else(crt: Any) -> None:
    first, second = crt.bundle.session(TARGET), crt.bundle.session(TARGET)
    assert first._guard.decoder.tensors._engine is second._guard.decoder.tensors._engine
    a = first.prefill([[40, 41]])
    second.prefill([[90, 91, 92]])
    b = first.step([42])
    alone = crt.bundle.session(TARGET, threads=2)
    assert alone._guard.decoder.tensors._engine is not first._guard.decoder.tensors._engine
    np.testing.assert_allclose(alone.prefill([[40, 41]]), a, rtol=0, atol=1e-5)
    np.testing.assert_allclose(alone.step([42]), b, rtol=0, atol=1e-5)


def test_closing_a_bundle_closes_its_sessions(copied: Path) -> None:
    bundle = load_bundle(copied, allow_unvalidated=True)
    session = bundle.session(TARGET)
    bundle.close()
    bundle.close()
    with pytest.raises(InputError, match="this session is closed"):
        session.step([40])
    with pytest.raises(InputError, match="this bundle is closed"):
        bundle.session(TARGET)


def edit_manifest(folder: Path, edit: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(sealed(manifest)))


def edit_targets(folder: Path, edit: Any) -> None:
    edit_manifest(folder, lambda manifest: edit(manifest["targets"]))


def test_a_bundle_of_compiled_targets_only_says_what_to_build(copied: Path) -> None:
    edit_targets(copied, lambda targets: [targets.pop(name) for name in (TARGET, "chunked", "broken")])
    with load_bundle(copied, allow_unvalidated=True) as bundle:
        assert bundle.targets == ("rtx-sm80-fp16",)
        with pytest.raises(UnsupportedError, match=r"only rtx-sm80-fp16; build it with --target ort-cpu-fp32"):
            bundle.default_target()


def test_a_target_without_a_graph_is_named(copied: Path) -> None:
    edit_targets(copied, lambda targets: targets[TARGET]["graphs"].pop("prefill"))
    with (
        load_bundle(copied, allow_unvalidated=True) as bundle,
        pytest.raises(BundleError, match="ort-cpu-fp32 has no prefill graph"),
    ):
        bundle.session(TARGET)
