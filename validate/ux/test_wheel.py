"""What users install: the wheel, and whether the tests really run against it."""

from __future__ import annotations

import os
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import crt_export as package

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    """The wheel that ``make test`` built."""
    path = os.environ.get("CRT_EXPORT_TEST_WHEEL")
    if not path:
        pytest.skip("CRT_EXPORT_TEST_WHEEL names no wheel: make test builds one and sets it")
    return zipfile.ZipFile(path)


@pytest.mark.skipif(
    os.environ.get("CRT_EXPORT_TEST_INSTALLED") != "1",
    reason="only make test installs the wheel before the tests",
)
def test_tests_run_against_the_installed_package(root: Path, python: Run) -> None:
    location = Path(package.__file__).resolve()
    assert "site-packages" in location.parts
    assert root / "crt_export" not in location.parents
    child = python("-c", "import crt_export; print(crt_export.__file__)")
    assert Path(child.stdout.strip()).resolve() == location


def test_wheel_holds_one_import_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"crt_export"}


def test_wheel_holds_the_whole_catalogue(wheel: zipfile.ZipFile, root: Path) -> None:
    tracked = [
        *root.glob("graphs/*.toml"),
        *root.glob("engines/*.toml"),
        root / "validate" / "tolerances.toml",
        *root.glob("validate/*.schema.json"),
    ]
    expected = {f"crt_export/_catalog/{path.relative_to(root).as_posix()}" for path in tracked}
    expected |= {f"crt_export/_catalog/validate/{name}" for name in ("heldout.txt", "LICENSE.PSF.txt")}
    found = {name for name in wheel.namelist() if "/_catalog/" in name}
    assert found == expected


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile, root: Path) -> None:
    modules = {path.relative_to(root).as_posix() for path in (root / "crt_export").rglob("*.py")}
    found = {name for name in wheel.namelist() if name.startswith("crt_export/") and "/_catalog/" not in name}
    templates = {path.relative_to(root).as_posix() for path in (root / "crt_export" / "report" / "templates").iterdir()}
    assert found == modules | templates | {"crt_export/py.typed"}


def test_wheel_carries_licence_and_notice(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name for name in wheel.namelist() if ".dist-info/licenses/" in name}
    assert names == {"LICENSE", "NOTICE"}


def test_wheel_needs_four_packages_only(wheel: zipfile.ZipFile) -> None:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    required = [line.split()[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(name.split(">")[0] for name in required) == ["click", "numpy", "rich", "safetensors"]


def test_constraints_pin_every_requirement_exactly(root: Path) -> None:
    pins = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, line
            assert "+" not in version, f"{line}: a local build cannot be installed elsewhere"
            pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = [*project["dependencies"], *extras["export"], *extras["cpu"], *extras["rtx"], *extras["dev"]]
    installed += [*extras["report"], *extras["browser"]]
    for requirement in installed:
        name = requirement.split("[")[0].split(">")[0].split(";")[0].strip().lower()
        assert name in pins, requirement
