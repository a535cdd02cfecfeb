"""Formats are held by their bytes, and a bundle of version 1 keeps doing what it did."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from crt_export.bundle import open_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.config import ModelConfig
from crt_export.parity.report import ParityReport
from crt_export.report.compare import SAME, compare_reports
from crt_export.report.reading import read_report
from crt_export.runtime import GenerationOptions, Snapshot, load_bundle
from crt_export.selftest import load_vectors, run_selftest

HERE = Path(__file__).resolve().parent
NAMES = ("manifest", "snapshot", "checkpoint", "vectors", "report", "weights")


@pytest.fixture(scope="module")
def make_golden() -> ModuleType:
    """The script beside this file."""
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_format_is_tested_and_every_golden_file_made(make_golden: ModuleType, tmp_path: Path) -> None:
    assert tuple(make_golden.FORMATS) == NAMES
    for make in make_golden.FORMATS.values():
        make(tmp_path)
    assert contents(tmp_path).keys() == contents(HERE / "formats").keys()


@pytest.mark.parametrize("name", NAMES)
def test_format_has_the_golden_bytes(
    make_golden: ModuleType, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make_golden.FORMATS[name](tmp_path)
    asked: list[str] = request.config.getoption("--update-golden") or []
    if name in asked or "formats" in asked:
        shutil.copytree(tmp_path, HERE / "formats", dirs_exist_ok=True)
    for file, content in contents(tmp_path).items():
        golden = HERE / "formats" / file
        same = golden.is_file() and golden.read_bytes() == content
        assert same, f"{file} is not what it was; if that is meant: pytest validate/golden --update-golden {name}"


def test_the_golden_files_read_back(make_golden: ModuleType) -> None:
    formats = HERE / "formats"
    assert Snapshot.load(formats / "session.snapshot").target == "ort-cuda-fp16"
    model = load_checkpoint(formats / "checkpoint")
    config: ModelConfig = make_golden.model_config(vocab_size=8, tokenizer="none")
    assert model.config == config
    assert load_vectors(formats / "vectors.safetensors", config.info, "c" * 64).runs == (
        "prefill.k2.chunk2",
        "recurrence",
    )
    document = json.loads((formats / "report.json").read_text(encoding="utf-8"))
    assert ParityReport.from_dict(document).to_dict() == document


# --- the bundle
@pytest.fixture(scope="module")
def recorded(make_golden: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the bundle generated when it was built."""
    asked: list[str] = request.config.getoption("--update-golden") or []
    if make_golden.BUNDLE in asked:
        fresh = tmp_path_factory.mktemp("golden")
        make_golden.bundle_v1(fresh)
        for name in (make_golden.BUNDLE, make_golden.RECORDED):
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(fresh / name, HERE / name)
    return json.loads((HERE / make_golden.RECORDED / "tokens.json").read_text(encoding="utf-8"))


def test_the_bundle_is_whole_and_validated(recorded: dict) -> None:
    files = open_bundle(HERE / "bundle-v1")
    files.verify_all()
    assert files.manifest["validated"]
    assert set(files.manifest["targets"]) == {"ort-cpu-fp32", "ort-cpu-int8"}
    assert sum(entry["size"] for entry in files.manifest["files"].values()) < 1_000_000


def test_the_report_of_the_bundle_reads_back_and_is_the_same_as_itself(recorded: dict) -> None:
    report = read_report(HERE / "bundle-v1")
    assert report.passed
    assert {row.target for row in report.rows} >= {"ort-cpu-fp32", "ort-cpu-int8"}
    comparison = compare_reports(report, ParityReport.from_dict(report.to_dict()), names=("bundle-v1", "read back"))
    assert comparison.passed
    assert {change.verdict for change in comparison.changes} == {SAME}


def test_the_bundle_passes_its_self_test(recorded: dict) -> None:
    report = run_selftest(HERE / "bundle-v1", ["ort-cpu-fp32", "ort-cpu-int8"])
    assert report.failures == ()
    assert report.passed


def test_the_bundle_generates_the_recorded_tokens(recorded: dict) -> None:
    with load_bundle(HERE / "bundle-v1") as bundle:
        session = bundle.session(recorded["target"])
        prompt = bundle.tokenizer.encode_prompt(recorded["prompt"])
        generation = session.generate([prompt], GenerationOptions(max_new_tokens=len(recorded["tokens"])))
        assert [token for (token,) in generation] == recorded["tokens"]


def test_the_recorded_snapshot_goes_on_with_the_recorded_tokens(recorded: dict) -> None:
    with load_bundle(HERE / "bundle-v1") as bundle:
        session = bundle.session(recorded["target"])
        session.restore(Snapshot.load(HERE / "bundle-v1.recorded" / "session.snapshot"))
        rest = recorded["tokens"][recorded["tokens_before_snapshot"] :]
        generation = session.generate(options=GenerationOptions(max_new_tokens=len(rest)))
        assert [token for (token,) in generation] == rest


def test_the_reference_is_the_checkpoint_it_was_built_from(recorded: dict) -> None:
    files = open_bundle(HERE / "bundle-v1")
    assert load_checkpoint(HERE / "bundle-v1" / "reference").sha256 == files.manifest["checkpoint"]["sha256"]


def test_the_c_program_passes_the_bundle(recorded: dict, cpp_build: Path) -> None:
    program = cpp_build / "crt-selftest"
    result = subprocess.run(
        [program, HERE / "bundle-v1"], capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
