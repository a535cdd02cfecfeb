"""A build that finds its stages stored makes the files that it would have made, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.checkpoint import load_checkpoint
from crt_export.errors import InputError
from crt_export.models.presets import write_preset
from crt_export.pipeline import BuildOptions, build
from crt_export.profile import load_profile
from crt_export.progress import no_progress
from crt_export.spec import graph_names
from crt_export.stages import graphs as graphs_module
from crt_export.stages.options import SHORT_VALIDATION
from crt_export.stages.store import StageStore

ONE_LAYER: dict[str, Any] = {
    "model_type": "transformer",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
}


def hashes(bundle: Path) -> dict[str, str]:
    """Of every file but the manifest, which lists the targets."""
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path], shared_traces: None) -> Path:
    return make_checkpoint(**ONE_LAYER)


def built(checkpoint: Path, output: Path, targets: tuple[str, ...], cache: Path | None) -> list[str]:
    """Build without validation; what progress said."""
    stages: list[str] = []
    options = BuildOptions(checkpoint=checkpoint, output=output, targets=targets, validated=False, cache=cache)
    build(options, progress=lambda stage, done, total: stages.append(stage))
    return stages


def test_graphs_are_exported_once_for_targets_that_share_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, exported, export = load_checkpoint(checkpoint), [], graphs_module._export
    monkeypatch.setattr(graphs_module, "_export", lambda *given: exported.extend(given[1]) or export(*given))
    store = StageStore(folder=tmp_path / "cache", note=lambda sentence: None)
    profile = load_profile("ort-cpu-fp32").with_capacity(64).with_unroll(1)
    written = {}
    for name, profiles in (("first", [profile]), ("second", [profile, profile.with_capacity(24)])):
        (tmp_path / name).mkdir()
        written[name] = graphs_module.write_graphs(loaded, profiles, None, tmp_path / name, no_progress, store)
    assert len(exported) == len(written["first"]) == len(graph_names(loaded.config.carried))
    assert written["second"] == written["first"]
    assert hashes(tmp_path / "second") == hashes(tmp_path / "first")


@pytest.mark.evidence
def test_another_target_leaves_the_files_of_the_others_as_they_were(tmp_path: Path) -> None:
    """With the stages stored, without them, and with one of them damaged; engines are compiled once."""
    pytest.importorskip("tensorrt_rtx")
    checkpoint = tmp_path / "checkpoint"
    write_preset("tiny", checkpoint)
    cache, some = tmp_path / "cache", ("rtx-sm80-fp16", "ort-cpu-fp32")
    built(checkpoint, tmp_path / "some", some, cache)
    stages = built(checkpoint, tmp_path / "more", (*some, "ort-cpu-int8"), cache)
    reused = [stage.split(": ", 1)[1] for stage in stages if stage.endswith("as stored by an earlier build")]
    assert reused == [
        "graphs fp32: as stored by an earlier build",
        "graphs fp16: as stored by an earlier build",
        "compile rtx-sm80-fp16: as stored by an earlier build",
    ]
    found, more = hashes(tmp_path / "some"), hashes(tmp_path / "more")
    assert {name: more[name] for name in found} == found
    (weights,) = cache.glob("graphs-*/files/graphs/w8.weights")
    weights.write_bytes(b"damaged")
    stages = built(checkpoint, tmp_path / "repaired", (*some, "ort-cpu-int8"), cache)
    assert any("damaged" in stage for stage in stages)
    assert hashes(tmp_path / "repaired") == more
    stages = built(checkpoint, tmp_path / "anew", (*some, "ort-cpu-int8"), None)
    assert not any("stored" in stage for stage in stages)
    anew = hashes(tmp_path / "anew")
    # The compiler does not promise the same bytes twice.
    assert {name: anew[name] for name in anew if "engines/" not in name} == {
        name: more[name] for name in more if "engines/" not in name
    }


def test_short_validation_has_a_reason_and_no_number_of_its_own(tmp_path: Path) -> None:
    given: dict[str, Any] = {"checkpoint": tmp_path, "output": tmp_path / "out"}
    parity = BuildOptions(**given, short_reason="a smoke test").parity
    assert parity.short_reason == "a smoke test"
    assert {name: getattr(parity, name) for name in SHORT_VALIDATION} == SHORT_VALIDATION
    with pytest.raises(InputError, match="not both"):
        BuildOptions(**given, short_reason="a smoke test", validation_tokens=8192)
