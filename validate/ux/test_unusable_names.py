"""Names that no file can have, and links that lead nowhere: an error with code 2 at every option, never a bug."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crt_export.bundle import open_bundle
from crt_export.cli import main
from crt_export.errors import BundleError
from crt_export.report.output import check_outputs

CASES = (
    ("inspect", "{name}"),
    ("validate", "{name}"),
    ("validate", "{golden}", "--level", "own-model", "--expect", "{name}"),
    ("build", "{name}", "--output", "{free}"),
    ("build", "{golden}/reference", "--output", "{name}"),
    ("report", "{name}", "--output", "{free}"),
    ("report", "{golden}", "--output", "{free}", "--bench", "{name}"),
    ("report", "{golden}", "--output", "{name}"),
    ("compare", "{name}", "{golden}"),
    ("bench", "{name}"),
    ("bench", "{golden}", "--rounds", "1", "--steps", "1", "--against", "{name}"),
    ("selftest", "{name}"),
    ("generate", "{name}", "--prompt", "a"),
    ("sign", "{golden}", "--key", "{name}"),
    ("verify", "{golden}", "--chain", "{name}"),
)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="lengths and links as POSIX has them")


@pytest.mark.parametrize("kind", ["a long path", "a long name", "a loop"])
@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_every_option_refuses_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], kind: str
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    name = {"a long path": "n" * 5000, "a long name": str(tmp_path / ("n" * 300)), "a loop": str(loop)}[kind]
    golden = root / "validate" / "golden" / "bundle-v1"
    given = [argument.format(name=name, golden=golden, free=tmp_path / "free") for argument in arguments]
    assert main(given) == 2, capsys.readouterr().err
    assert not (tmp_path / "free").exists()
    assert loop.is_symlink()


def test_a_bundle_of_such_a_name() -> None:
    with pytest.raises(BundleError, match=r"of 5,000 characters \(File name too long\)"):
        open_bundle("n" * 5000)


def test_an_output_inside_an_input_that_is_a_loop_is_still_told_apart(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    check_outputs([tmp_path / "page.html"], inputs=[loop])
