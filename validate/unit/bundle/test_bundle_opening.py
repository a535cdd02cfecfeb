"""A loader opens what was built, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle import open_bundle
from crt_export.bundle.held import HeldFile
from crt_export.engine.ort import import_onnxruntime
from crt_export.errors import BundleError

Manifest = dict[str, Any]
Build = Callable[..., Path]
Edit = Callable[[Path, Callable[[Manifest], object]], None]


def test_round_trip(bundle: Path, manifest: Manifest) -> None:
    opened = open_bundle(bundle)
    opened.verify_all()
    assert opened.path == bundle
    assert {key: opened.manifest[key] for key in manifest} == manifest
    assert opened.manifest["schema_version"] == 1
    assert opened.names == ("engines/step.plan", "graphs/fp32.weights", "graphs/step.fp32.onnx", "report.md")
    assert opened.file("report.md").read_text("utf-8") == "first"
    assert "report.md" in opened
    assert "manifest.json" not in opened


def test_onnxruntime_runs_the_verified_graph(bundle: Path) -> None:
    path = open_bundle(bundle).graph("graphs/step.fp32.onnx")
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": [[1.0, 2.0, 3.0, 4.0]]})
    assert np.asarray(result).tolist() == [[1.0, 2.0, 3.0, 4.0]]


# ---------------------------------------------------------------- files


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def to_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def folder_to_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to("moved")


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "one bit": (flip, "SHA-256"),
    "size": (grow, "bytes, the manifest says"),
    "missing": (Path.unlink, "is missing"),
    "link": (to_link, "goes through a link"),
    "linked folder": (folder_to_link, r"goes through a link \('graphs'\)"),
    "pipe": (to_pipe, "not a regular file"),
    "folder": (to_folder, "not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["graphs/fp32.weights", "graphs/step.fp32.onnx"])
def test_damaged_file_is_refused_by_file_graph_and_verify_all(damage: str, name: str, bundle: Path) -> None:
    act, message = DAMAGE[damage]
    act(bundle / name)
    opened = open_bundle(bundle)
    with pytest.raises(BundleError, match=f"{name}.*{message}"):
        opened.file(name)
    with pytest.raises(BundleError, match=message):
        opened.graph("graphs/step.fp32.onnx")
    with pytest.raises(BundleError, match=message):
        opened.verify_all()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_after_the_first_check_is_noticed(damage: str, bundle: Path) -> None:
    opened = open_bundle(bundle)
    path = opened.file("graphs/fp32.weights")
    opened.graph("graphs/step.fp32.onnx")
    act, message = DAMAGE[damage]
    act(path)
    with pytest.raises(BundleError, match=message):
        opened.file("graphs/fp32.weights")
    with pytest.raises(BundleError, match=message):
        opened.graph("graphs/step.fp32.onnx")


def test_a_file_is_hashed_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = HeldFile.digest

    def counting(file: HeldFile) -> Any:
        hashed.append(Path(f"/proc/self/fd/{file.descriptor}").readlink().name)
        return original(file)

    monkeypatch.setattr(HeldFile, "digest", counting)
    opened = open_bundle(bundle)
    for _ in range(3):
        opened.file("graphs/fp32.weights")
        opened.graph("graphs/step.fp32.onnx")
        opened.held_graph("graphs/step.fp32.onnx")
    assert hashed == ["fp32.weights", "step.fp32.onnx"]


def test_unlisted_name_is_refused_with_the_nearest_listed_one(bundle: Path) -> None:
    (bundle / "graphs" / "extra").write_bytes(b"")
    opened = open_bundle(bundle)
    for name in ("graphs/extra", "../demo/report.md", str(bundle / "report.md"), "manifest.json"):
        with pytest.raises(BundleError, match="not listed"):
            opened.file(name)
    with pytest.raises(BundleError, match=r"did you mean 'report\.md'"):
        opened.file("report.mdx")


def test_verify_all_reports_every_problem_at_once(bundle: Path) -> None:
    flip(bundle / "report.md")
    (bundle / "graphs" / "fp32.weights").unlink()
    (bundle / "graphs" / "extra.onnx").write_bytes(b"")
    (bundle / "link").symlink_to("report.md")
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle).verify_all()
    message = str(caught.value)
    assert "5 problems" in message  # the missing weights count for the file and for the graph that needs them
    for part in (
        "'report.md' has SHA-256",
        "'graphs/fp32.weights' is missing",
        "'graphs/extra.onnx' is not listed",
    ):
        assert part in message
    assert "'link' is a link" in message


# ---------------------------------------------------------------- external data


def test_graph_must_be_one_of_the_manifest(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"'report\.md' is not a graph .* graphs/step\.fp32\.onnx"):
        open_bundle(bundle).graph("report.md")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/etc/passwd", "absolute path"),
        ("../report.md", r"'\.\.', which could lead out"),
        ("../../secret", r"'\.\.', which could lead out"),
        ("..\\secret", r"contains '\\\\'"),
        ("C:/secret", "contains ':'"),
        ("fp32.weights/../fp32.weights", "could lead out"),
        ("unlisted.weights", "is not listed in the manifest"),
        ("*/_ORT_MEM_ADDR_/*", r"contains '\*'"),
        ("", "must have 1 to"),
    ],
)
def test_external_data_that_leads_elsewhere_is_refused(
    location: str, message: str, tmp_path: Path, build: Build
) -> None:
    # commit does not parse graphs, so a hostile one can be given a correct hash like this
    opened = open_bundle(build(tmp_path / "demo", location=location))
    (opened.path / "graphs" / "unlisted.weights").write_bytes(bytes(64))
    with pytest.raises(BundleError, match=message):
        opened.graph("graphs/step.fp32.onnx")
    with pytest.raises(BundleError, match=message):
        opened.verify_all()


def test_external_data_behind_a_link_is_refused_though_its_content_is_right(bundle: Path) -> None:
    to_link(bundle / "graphs" / "fp32.weights")
    with pytest.raises(BundleError, match="goes through a link"):
        open_bundle(bundle).graph("graphs/step.fp32.onnx")


def test_graph_that_only_a_target_names_is_checked_through_its_external_data(
    tmp_path: Path, build: Build, manifest: Manifest
) -> None:
    bundle = build(tmp_path / "demo", graphs=[])
    assert manifest["targets"]["ort-cpu-fp32"]["graphs"]["step"] == "graphs/step.fp32.onnx"
    open_bundle(bundle).graph("graphs/step.fp32.onnx")
    flip(bundle / "graphs" / "fp32.weights")
    with pytest.raises(BundleError, match=r"tensor 'w' points at 'fp32\.weights', which has SHA-256"):
        open_bundle(bundle).graph("graphs/step.fp32.onnx")


# ---------------------------------------------------------------- the folder


def test_unvalidated_bundle_needs_consent(tmp_path: Path, build: Build) -> None:
    bundle = build(tmp_path / "demo", validated=False, parity=None)
    with pytest.raises(BundleError, match="allow_unvalidated=True"):
        open_bundle(bundle)
    assert open_bundle(bundle, allow_unvalidated=True).manifest["validated"] is False


def test_paths_that_are_no_bundle(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        open_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="found a file"):
        open_bundle(bundle / "manifest.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        open_bundle(tmp_path / "empty")


def test_a_link_to_a_bundle_may_be_opened(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle)
    opened = open_bundle(tmp_path / "latest")
    assert opened.path == bundle
    opened.verify_all()


@pytest.mark.parametrize("kind", ["partial", "previous"])
def test_leftovers_are_refused_even_if_complete(kind: str, tmp_path: Path, bundle: Path) -> None:
    leftover = bundle.rename(tmp_path / f".demo.{kind}-4194304")
    with pytest.raises(BundleError, match="interrupted or running build") as caught:
        open_bundle(leftover)
    assert str(tmp_path / "demo") in str(caught.value)


def test_missing_bundle_with_an_unfinished_build_beside_it_says_so(tmp_path: Path) -> None:
    (tmp_path / ".demo.partial-4194304").mkdir()
    with pytest.raises(BundleError, match=r"unfinished build is beside it \(\.demo\.partial-4194304\)"):
        open_bundle(tmp_path / "demo")


def test_bundle_replaced_while_open_is_noticed(tmp_path: Path, bundle: Path, build: Build) -> None:
    opened = open_bundle(bundle)
    opened.file("report.md")
    build(bundle, content="other")
    with pytest.raises(BundleError, match="was replaced since it was opened"):
        opened.file("report.md")
    assert opened.content("report.md") == b"first"


def test_manifest_is_readable_json_text(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text("utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_reading_a_bundle_imports_nothing_but_the_standard_library(bundle: Path) -> None:
    script = (
        "import sys; from crt_export.bundle import open_bundle; open_bundle(sys.argv[1]).verify_all(); "
        "print(sorted({'torch', 'onnx', 'numpy', 'onnxruntime', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
