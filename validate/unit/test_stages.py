"""Builds with options of their own: what ends up in the bundle, and what a build that fails leaves behind.

Three builds in all, each of a one-layer plain transformer: exporting is what takes the time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export import catalog
from crt_export.bundle import open_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.cli import main
from crt_export.errors import BundleError, InputError
from crt_export.parity import ParityReport
from crt_export.parity.check import validate_bundle
from crt_export.pipeline import BuildOptions, BuildResult, build
from crt_export.profile import load_profile
from crt_export.runtime import load_bundle
from crt_export.stages.calibration import read_build_text
from crt_export.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_traces")]

Make = Callable[..., Path]
ONE_LAYER: dict[str, Any] = {
    "model_type": "transformer",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- text, before anything is exported


@pytest.mark.parametrize(("target", "validated"), [("rtx-sm80-int8", False), ("ort-cpu-int8", True)])
def test_only_the_text_that_is_needed_is_asked_for(
    tiny_checkpoint: Path, heldout_text: Path, tmp_path: Path, target: str, validated: bool
) -> None:
    """w8a8 calibrates on 4096 tokens and, unvalidated, needs no others; w8 needs none but those to validate on."""
    loaded = load_checkpoint(tiny_checkpoint)
    tokenizer = load_tokenizer(tiny_checkpoint, loaded.config)
    text = tmp_path / "short.txt"
    text.write_bytes(heldout_text.read_bytes()[: 4097 if validated else 4096])
    options = BuildOptions(checkpoint=tiny_checkpoint, output=tmp_path / "out", text=text, validated=validated)
    found = read_build_text(loaded, tokenizer, [load_profile(target).with_capacity(64)], options)
    assert (found.calibration is None, found.validation is None) == (validated, not validated)
    part = found.validation if validated else found.calibration
    assert part is not None
    assert len(part) == len(text.read_bytes())


def test_default_text_is_announced_and_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_checkpoint)
    stages: list[str] = []
    found = read_build_text(
        loaded,
        load_tokenizer(tiny_checkpoint, loaded.config),
        [load_profile("ort-cpu-fp32")],
        BuildOptions(checkpoint=tiny_checkpoint, output=tmp_path / "out"),
        lambda stage, done, total: stages.append(stage),
    )
    assert stages == ["no --text given: the packaged default text is used"]
    assert found.identity is not None
    assert found.identity["name"] == "default text"


# ---------------------------------------------------------------- validated, without reference, for a user's target


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Make) -> Path:
    """What the bundle without reference is built from."""
    return make_checkpoint(**ONE_LAYER)


@pytest.fixture(scope="module")
def own_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own profile: the tracked one under another name, with another capacity."""
    tracked = catalog.definition_path("engines", "ort-cpu-fp32.toml").read_text(encoding="utf-8")
    own = tracked.replace('name = "ort-cpu-fp32"', 'name = "mine"').replace("capacity = 1024", "capacity = 48")
    assert own.count("mine") == own.count("= 48") == 1
    file = tmp_path_factory.mktemp("profile") / "my-profile.toml"
    file.write_text(own.replace("seq = [1, 64, 1024]", "seq = [1, 16, 48]"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def lean(
    checkpoint: Path, own_target: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildResult:
    """A validated bundle without its checkpoint."""
    output = tmp_path_factory.mktemp("lean") / "bundle"
    return build(
        BuildOptions(
            checkpoint=checkpoint, output=output, targets=(str(own_target),), text=heldout_text, reference=False
        )
    )


def test_bundle_without_reference_holds_no_weights_of_the_checkpoint(lean: BuildResult) -> None:
    assert not (lean.path / "reference").exists()
    assert [name for name in tree(lean.path) if name.endswith(".safetensors")] == ["selftest/vectors.safetensors"]


def test_bundle_without_reference_validates_with_its_own_checkpoint_only(
    lean: BuildResult, checkpoint: Path, make_checkpoint: Make, heldout_text: Path
) -> None:
    with pytest.raises(BundleError, match="--checkpoint"):
        validate_bundle(lean.path, text=heldout_text)
    with pytest.raises(InputError, match="give the very checkpoint"):
        validate_bundle(lean.path, text=heldout_text, checkpoint=make_checkpoint(seed=1, **ONE_LAYER))
    assert validate_bundle(lean.path, text=heldout_text, checkpoint=checkpoint).passed


def test_users_own_target_runs_under_its_name_and_capacity(lean: BuildResult) -> None:
    with load_bundle(lean.path) as bundle:
        assert bundle.targets == ("mine",)
        session = bundle.session("mine")
        assert session.prefill([list(b"text")]).shape == (1, 256)
        with pytest.raises(InputError, match="48"):
            session.prefill([[0] * 45])


def test_manifest_holds_resolved_options(lean: BuildResult, heldout_text: Path) -> None:
    manifest = open_bundle(lean.path).manifest
    options = manifest["options"]
    ids = b"".join(byte.to_bytes(8, "little") for byte in heldout_text.read_bytes())
    assert options["targets"] == ["mine"]
    assert options["text"] == {"name": "heldout.txt", "sha256": hashlib.sha256(ids).hexdigest()}
    assert (options["reference"], options["validated"], options["calibration"]) == (False, True, None)
    assert options["validation_tokens"] == 4096
    assert (manifest["targets"]["mine"]["capacity"], manifest["targets"]["mine"]["unroll"]) == (48, 1)


# ---------------------------------------------------------------- not validated


@pytest.fixture(scope="module")
def overflowing(make_checkpoint: Make) -> Path:
    """Fine in FP32; one inner value of the MLP lies beyond what FP16 can be trusted with."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up.bias"][0] = 30_000.0

    return make_checkpoint(edit=edit, **ONE_LAYER)


@pytest.fixture(scope="module")
def unvalidated(overflowing: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """A bundle that was never compared with PyTorch."""
    output = tmp_path_factory.mktemp("unvalidated") / "bundle"
    target = ("ort-cpu-fp32",)
    return build(BuildOptions(checkpoint=overflowing, output=output, targets=target, validated=False))


def test_unvalidated_bundle_needs_consent(unvalidated: BuildResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert unvalidated.report is None
    with pytest.raises(BundleError, match="not validated"):
        load_bundle(unvalidated.path)
    with load_bundle(unvalidated.path, allow_unvalidated=True) as bundle:
        assert bundle.manifest["parity"] is None
        assert bundle.manifest["options"]["text"] is None
        assert bundle.session("ort-cpu-fp32").prefill([[1, 2]]).shape == (1, 256)
    assert main(["generate", str(unvalidated.path), "--prompt", "x"]) == 2
    message = capsys.readouterr().err
    assert "--unvalidated" in message
    assert "crt-export validate" in message
    assert "allow_unvalidated" not in message


# ---------------------------------------------------------------- parity fails


def test_build_that_fails_parity_reports_all_and_leaves_the_old_output(
    overflowing: Path,
    unvalidated: BuildResult,
    heldout_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(unvalidated.path, tmp_path / "bundle"))
    before = tree(tmp_path)
    command = ["build", str(overflowing), "--output", str(output), "--target", "ort-cuda-fp16"]
    assert main([*command, "--text", str(heldout_text), "--json"]) == 1
    captured = capsys.readouterr()
    assert "no bundle was written" in captured.err
    assert "the limit is 16376" in captured.err
    report = json.loads(captured.out)
    assert report["passed"] is False
    rows = ParityReport.from_dict(report).rows
    assert {row.target for row in rows} >= {"ort-cuda-fp16"}
    assert {False, True} <= {row.passed for row in rows}
    assert tree(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
