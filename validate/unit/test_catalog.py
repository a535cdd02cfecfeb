from __future__ import annotations

from pathlib import Path

import pytest

from crt_export import catalog
from crt_export.errors import MissingDependencyError


def test_definitions_are_found_by_kind_and_name() -> None:
    path = catalog.definition_path("engines", "ort-cpu-fp32.toml")
    assert path in catalog.definitions("engines")
    assert path.is_file()


def test_default_text_is_real_text() -> None:
    text = catalog.default_text().read_text(encoding="utf-8")
    assert len(text) > 4096
    assert text.count(" the ") > 50


@pytest.mark.parametrize("filename", ["absent.toml", "../engines/ort-cpu-fp32.toml", "."])
def test_anything_but_a_file_of_the_catalogue_is_refused(filename: str) -> None:
    with pytest.raises(MissingDependencyError, match="reinstall"):
        catalog.definition_path("engines", filename)


def test_wheel_layout_wins_over_folders_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "crt_export"
    (tmp_path / "engines").mkdir()
    (package / "_catalog" / "engines").mkdir(parents=True)
    (tmp_path / "engines" / "foreign.toml").touch()
    (package / "_catalog" / "engines" / "ours.toml").touch()
    monkeypatch.setattr(catalog, "_PACKAGE", package)
    assert [path.name for path in catalog.definitions("engines")] == ["ours.toml"]


def test_incomplete_installation_is_an_environment_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "crt_export")
    with pytest.raises(MissingDependencyError, match=r"no graphs/\*\.toml") as caught:
        catalog.definitions("graphs")
    assert caught.value.exit_code == 3
