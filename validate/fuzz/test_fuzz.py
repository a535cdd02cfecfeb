"""The fuzzer finds what is planted and nothing else; for a minute in each language in make evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Every so many seconds of each language in make evidence; a longer campaign is a matter of this variable.
SECONDS = os.environ.get("CRT_EXPORT_FUZZ_SECONDS", "60")
SEED = os.environ.get("CRT_EXPORT_FUZZ_SEED", "12")


def fuzz(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "validate" / "fuzz" / "run.py"), "--folder", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=3000, check=False)


def test_a_planted_fault_is_found_made_small_and_replayed(tmp_path: Path) -> None:
    planted = ("--language", "python", "--plant-fault", "value-error")
    found = fuzz(tmp_path, *planted, "--kind", "manifest", "--cases", "10", "--seed", "1")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "open: json.decoder.JSONDecodeError: " in found.stdout
    stored = sorted(tmp_path.glob("python-manifest-1-*.json"))
    assert stored
    assert len(json.loads(stored[0].read_bytes())["case"]["edits"]) == 1
    again = fuzz(tmp_path, *planted, "--replay", str(stored[0]))
    assert again.returncode == 1, again.stdout
    mended = fuzz(tmp_path, "--language", "python", "--replay", str(stored[0]))
    assert mended.returncode == 0, mended.stdout


def test_a_process_that_ends_names_its_input(tmp_path: Path) -> None:
    options = ("--language", "python", "--kind", "manifest", "--cases", "8", "--seed", "4")
    found = fuzz(tmp_path, *options, "--plant-fault", "crash")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "crash: the process ended with -6" in found.stdout
    assert sorted(tmp_path.glob("python-manifest-4-*.json"))


def test_languages_that_disagree_are_found(tmp_path: Path, cpp_build: Path) -> None:
    library = ("--library", str(cpp_build / "libcrt_runtime.so"))
    options = ("--language", "both", *library, "--kind", "snapshot", "--cases", "15", "--seed", "1")
    found = fuzz(tmp_path, *options, "--plant-fault", "no-checksum")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "load: Python accepted (), C++ refused (" in found.stdout


def test_a_few_inputs_of_every_kind_break_nothing(tmp_path: Path) -> None:
    output = tmp_path / "counts.json"
    ran = fuzz(tmp_path, "--language", "python", "--cases", "3", "--seed", "7", "--output", str(output))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = json.loads(output.read_bytes())["counts"]["python"]
    assert {kind["cases"] for kind in counts.values()} == {3}
    assert len(counts) == 8


@pytest.mark.evidence
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("language", "counts"), [("both", "counts.json"), ("cpp", "counts-sanitized.json")])
def test_every_language_for_a_minute_and_cpp_under_the_sanitizers(
    cpp_build: Path, capsys: pytest.CaptureFixture[str], language: str, counts: str
) -> None:
    build = ROOT / "build" / "cpp-sanitize" if "sanitized" in counts else cpp_build
    library, folder = build / "libcrt_runtime.so", ROOT / "build" / "fuzz"
    if not library.is_file():
        pytest.skip(f"there is no {library}: make evidence builds it")
    options = ("--library", str(library), "--seconds", SECONDS, "--seed", SEED, "--output", str(folder / counts))
    _say_and_pass(fuzz(folder, "--language", language, *options), capsys)


@pytest.mark.evidence
@pytest.mark.timeout(0)
def test_libfuzzer_on_the_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ROOT / "build" / "clang" / "missing.txt"
    build = ROOT / "build" / "cpp-fuzz"
    if not (build / "fuzz" / "fuzz_manifest").is_file():
        reason = missing.read_text("utf-8").strip() if missing.is_file() else f"there is no {build}: make fuzzers"
        if os.environ.get("CRT_EXPORT_REQUIRE_CPP") == "1":
            pytest.fail(f"CRT_EXPORT_REQUIRE_CPP=1, but {reason}")
        pytest.skip(reason)
    seconds = str(max(1, int(float(SECONDS)) // 12))
    command = [sys.executable, str(ROOT / "validate" / "fuzz" / "libfuzzer.py"), "--build", str(build)]
    ran = subprocess.run(
        [*command, "--seconds", seconds, "--seed", SEED], capture_output=True, encoding="utf-8", check=False
    )
    _say_and_pass(ran, capsys)


def _say_and_pass(ran: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{ran.stdout}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
