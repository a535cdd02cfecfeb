"""Files that a command writes: never in place of what it reads; links and pipes as a shell treats them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from crt_export.cli import app
from crt_export.errors import InputError
from crt_export.report.output import check_outputs, write_output


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("text.txt", "text.txt is text.txt, which is read"),
        ("bundle/manifest.json", "lies in bundle, which is read"),
        ("bundle/new.xml", "lies in bundle, which is read"),
        ("linked.txt", "is text.txt, which is read"),
        ("folder", "is a folder, expected a file"),
        ("nowhere/x.json", "does not exist, make it first"),
    ],
)
def test_an_output_that_would_do_harm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bundle", "folder"):
        Path(name).mkdir()
    Path("text.txt").write_text("kept")
    Path("linked.txt").symlink_to("text.txt")
    with pytest.raises(InputError, match=sentence):
        check_outputs([Path(output)], inputs=[Path("bundle"), Path("text.txt"), None])


def test_two_outputs_at_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        check_outputs([tmp_path / "x", tmp_path / "." / "x"])


def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="x is a file, expected a folder"):
        check_outputs([], folder=tmp_path / "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe, expected a folder"):
        check_outputs([], folder=tmp_path / "pipe")


def test_a_socket_is_neither_replaced_nor_found_out_after_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    with pytest.raises(InputError, match="socket is a socket, expected a file"):
        check_outputs([Path("socket")])
    with pytest.raises(InputError, match="socket is a socket, expected a file"):
        write_output(Path("socket"), "new")
    assert Path("socket").is_socket()


def test_a_link_is_followed_and_a_pipe_stays_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("option", "value"), [("--long-run-tokens", "4096"), ("--save-outputs", "out")])
def test_an_option_whose_level_does_not_run_is_refused(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["validate", "bundle", "--level", "corpus", option, value])
    assert isinstance(result.exception, SystemExit | click.UsageError)
    assert f"{option} is for the level" in result.output
