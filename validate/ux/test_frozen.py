"""A zipped application opens a bundle: the package lies in the archive, its metadata nowhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipapp
from pathlib import Path

import pytest

import crt_export

MAIN = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
import crt_export
from crt_export.profile import list_profiles
from crt_export.report.reading import report_schema
from crt_export.runtime import GenerationOptions, generate_text, load_bundle
from crt_export.selftest import run_selftest
try:
    version("crt-export")
    metadata = True
except PackageNotFoundError:
    metadata = False
with load_bundle(sys.argv[1]) as bundle:
    session = bundle.session("ort-cpu-fp32", threads=1)
    session.prefill([[65, 66]])
    logits = session.step([67])
    text = "".join(generate_text(bundle, "ab", GenerationOptions(max_new_tokens=3), target="ort-cpu-fp32"))
print(json.dumps({
    "file": crt_export.__file__, "metadata": metadata, "logits": logits[0].tolist(), "text": text,
    "profiles": [profile.name for profile in list_profiles()], "schema": sorted(report_schema()["properties"])[0],
    "selftest": run_selftest(sys.argv[1], ["ort-cpu-fp32"]).passed,
}))
"""
#: What the runtime needs besides the package itself; binary wheels cannot be imported from a zip file.
LIBRARIES = ("numpy", "numpy.libs", "onnxruntime", "safetensors", "google", "flatbuffers", "packaging", "ml_dtypes")


@pytest.fixture
def application(root: Path, tmp_path: Path) -> Path:
    """A zipapp with the package as the wheel lays it out."""
    package = tmp_path / "app" / "crt_export"
    shutil.copytree(Path(crt_export.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "_catalog"))
    for kind, pattern in (("graphs", "*.toml"), ("engines", "*.toml"), ("validate", "*.toml"), ("validate", "*.json")):
        (package / "_catalog" / kind).mkdir(parents=True, exist_ok=True)
        for file in (root / kind).glob(pattern):
            shutil.copy(file, package / "_catalog" / kind)
    (tmp_path / "app" / "__main__.py").write_text(MAIN, encoding="utf-8")
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz")
    return tmp_path / "app.pyz"


def test_zipped_application_opens_and_runs_a_bundle(application: Path, root: Path, tmp_path: Path) -> None:
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    for name in LIBRARIES:
        found = [Path(place) / name for place in places if (Path(place) / name).is_dir()]
        if found:
            (libraries / name).symlink_to(found[0])
    golden = root / "validate" / "golden" / "bundle-v1"
    result = subprocess.run(
        [sys.executable, "-S", application, golden],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(libraries), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["file"].startswith(str(application))
    assert answer["metadata"] is False
    assert {"ort-cpu-fp32", "ort-cpu-int8"} <= set(answer["profiles"])
    assert (len(answer["logits"]), answer["selftest"]) == (256, True)
    assert answer["text"] == expected_text(golden)


def expected_text(bundle: Path) -> str:
    from crt_export.runtime import GenerationOptions, generate_text, load_bundle

    with load_bundle(bundle) as opened:
        return "".join(generate_text(opened, "ab", GenerationOptions(max_new_tokens=3), target="ort-cpu-fp32"))


def test_doctor_of_an_installation_without_metadata(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata

    from crt_export import environment
    from crt_export.cli import main

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(environment, "_claims", dict)
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    versions = {package["name"]: package["version"] for package in findings["packages"]}
    assert versions["onnxruntime"] is not None
    assert versions["onnxruntime"][0].isdigit()
    assert findings["onnxruntime"] == ["onnxruntime"]
    status = {target["name"]: target["status"] for target in findings["targets"]}
    assert status["ort-cpu-fp32"] == "run"
    assert findings["problems"] == []
