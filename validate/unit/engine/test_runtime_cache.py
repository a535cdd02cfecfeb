"""The cache of compiled kernels: kept in the user's folder, harmless whatever happens to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from crt_export.engine.tensorrt import engine
from crt_export.engine.tensorrt.engine import cache_path, read_cache, write_cache


def test_it_lies_where_the_xdg_specification_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("1.7/x") == tmp_path / "crt-export" / "tensorrt-rtx" / "1.7" / "x.cache"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_path("x") == tmp_path / "home" / ".cache" / "crt-export" / "tensorrt-rtx" / "x.cache"


def test_no_home_folder_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(engine.Path, "home", homeless)
    assert cache_path("x") is None
    assert read_cache(None) is None
    assert not write_cache(None, b"kernels")


def test_what_is_written_is_read_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.cache"
    assert read_cache(path) is None
    assert write_cache(path, b"kernels")
    assert read_cache(path) == b"kernels"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not write_cache(path, b"kernels"), "written again without need"
    assert not write_cache(path, b""), "nothing replaces something"
    assert write_cache(path, b"more kernels")
    assert read_cache(path) == b"more kernels"
    assert [found.name for found in path.parent.iterdir()] == ["b.cache"]


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c + b"x", lambda c: b"", lambda c: c[:40] + b"?" + c[41:]]
)
def test_a_damaged_file_is_none(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "x.cache"
    write_cache(path, b"kernels" * 10)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert read_cache(path) is None
    assert write_cache(path, b"kernels")
    assert read_cache(path) == b"kernels"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_folder_that_cannot_be_made_or_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert not write_cache(tmp_path / "file" / "x.cache", b"kernels")
    (tmp_path / "x.cache").mkdir()
    assert not write_cache(tmp_path / "x.cache", b"kernels")
    assert read_cache(tmp_path / "x.cache") is None
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "x.cache"]
