"""The native programs: what cannot be written is no success, and no control character of a bundle comes out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "validate" / "golden" / "bundle-v1"
EXAMPLES = ROOT / "build" / "cpp" / "examples"  # projects of their own, over the installed library
EMBED_CPP = f"{EXAMPLES}/02_embed_cpp/embed_cpp"
PROGRAMS = {
    "crt-selftest": "./crt-selftest {golden} ort-cpu-fp32",
    "02_embed_cpp": f"{EMBED_CPP} {{golden}} ab",
    "03_embed_c": f"{EXAMPLES}/03_embed_c/embed_c {{golden}} ab",
}
Shell = Callable[[str], "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def shell(cpp_build: Path) -> Shell:
    """``shell(command)``: run by sh in the folder of the programs."""
    return lambda command: subprocess.run(
        ["/bin/sh", "-c", command], cwd=cpp_build, capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_results_that_are_lost_are_exit_3(shell: Shell, name: str, redirection: str) -> None:
    command = PROGRAMS[name].format(golden=GOLDEN)
    assert shell(command).returncode == 0
    result = shell(f"{command} {redirection}")
    assert result.returncode == 3, result.stderr
    assert b"error: stdout cannot be written to" in result.stderr


def test_selftest_waits_for_a_slow_reader(cpp_build: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    assert os.write(writing, b"x" * 65536) == 65536  # full, before the program begins
    process = subprocess.Popen([cpp_build / "crt-selftest", GOLDEN, "ort-cpu-fp32"], stdout=writing)
    os.close(writing)
    time.sleep(1)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read().lstrip(b"x")
    assert process.wait(60) == 0
    assert content.startswith(b"ort-cpu-fp32  step")
    assert content.endswith(b" s)\n")


def test_control_characters_of_a_bundle_are_escaped(
    shell: Shell, tmp_path: Path, sign_again: Callable[[Path], None]
) -> None:
    bundle = Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["targets"]["\x1b]0;pwned\x07\x9b2J\u202e"] = manifest["targets"].pop("ort-cpu-int8")
    path.write_text(json.dumps(manifest), encoding="utf-8")
    sign_again(bundle)
    for program in ("./crt-selftest", EMBED_CPP):
        for arguments in (f"{bundle}", f"{bundle} absent", f"{tmp_path}/$(printf '\\033[2J')x ab"):
            result = shell(f"{program} {arguments}")
            assert result.returncode in (0, 1, 2, 3), result.stderr
            said = (result.stdout + result.stderr).decode()
            assert not any(character in said for character in "\x1b\x07\x9b\u202e"), said
