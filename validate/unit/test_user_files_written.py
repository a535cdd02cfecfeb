"""A file is written whole or not at all; links stay, and what is no file is never replaced by one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from crt_export.user_files import write_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and links of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_target_of_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_bytes(b"old")
    for link, target in (("link", "disk/real"), ("again", "link"), ("dangling", "disk/new")):
        (tmp_path / link).symlink_to(target)
        write_file(tmp_path / link, link.encode())
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / link).read_bytes() == link.encode()
    assert names(tmp_path / "disk") == ["new", "real"]  # nothing beside them
    assert (tmp_path / "disk" / "real").read_bytes() == b"again"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        write_file(tmp_path / "loop", b"")
    (tmp_path / "astray").symlink_to("nowhere/file")
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "astray", b"")


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = {name: (tmp_path / name).stat() for name in ("folder", "pipe")}
    for name, words in (
        ("folder", "it is a folder"),
        ("pipe", "it is a pipe"),
        ("", "No such file"),
        ("x\0", "no name"),
    ):
        with pytest.raises(OSError, match=words):
            write_file(os.path.join(tmp_path, name) if name else "", b"content")  # noqa: PTH118
    with pytest.raises(OSError, match="it is a device"):
        write_file("/dev/null", b"content")
    assert {name: (tmp_path / name).stat() for name in before} == before
    assert names(tmp_path) == ["folder", "pipe"]


def test_a_stream_is_written_through_where_that_is_wanted(tmp_path: Path) -> None:
    write_file("/dev/null", b"content", streams=True)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):  # nobody reads it: refused at once, not waited for
        write_file(tmp_path / "pipe", b"lost", streams=True)
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"through", streams=True)
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_permissions_are_the_old_file_s_or_the_umask_s(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_file(tmp_path / "new", b"")
        (tmp_path / "private").touch(mode=0o600)
        write_file(tmp_path / "private", b"content")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_a_name_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    write_file(tmp_path / ("n" * 255), b"content")
    assert names(tmp_path) == ["n" * 255]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
