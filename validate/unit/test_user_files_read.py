"""What a user names as a file to read: links are followed; nothing hangs or fills the memory."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from crt_export.user_files import is_input, open_input, read_input

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and links of POSIX")


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_input(tmp_path / "link", most=7) == b"content"
    with open_input(tmp_path / "file", follow=False) as stream:
        assert os.get_inheritable(stream.fileno()) is False
        assert stream.read() == b"content"
    with pytest.raises(OSError, match="symbolic links"):
        open_input(tmp_path / "link", follow=False)


def test_whatever_is_no_file_is_refused_at_once_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))  # the path of a socket may be 107 bytes long
    found = {
        "folder": "it is a folder",
        "pipe": "it is a pipe",
        "link": "it is a pipe",
        "socket": "it is a socket",
        "/dev/zero": "it is a device",
        "absent": "No such file",
        "nul\0": "no name of a file",
        "\ud800": "no name of a file",
    }
    for name, words in found.items():
        with pytest.raises(OSError, match=words):
            read_input(os.path.join(tmp_path, name), most=10)  # noqa: PTH118 - Path() knows no surrogates
        assert not is_input(os.path.join(tmp_path, name))  # noqa: PTH118


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(2**40)  # a sparse file: reading it would take minutes and a terabyte
    with pytest.raises(OSError, match=r"it has 1,099,511,627,776 bytes or more, expected at most 1 MiB") as caught:
        read_input(tmp_path / "large", most=2**20)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="a file of Linux that claims to be empty")
def test_a_file_that_delivers_more_than_it_claims_is_read_to_the_limit_only() -> None:
    with pytest.raises(OSError, match="expected at most 100 bytes"):
        read_input("/proc/self/maps", most=100)
