"""What make cpp builds: the C++ tests pass, the library shows its API only, sources and versions are in step."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import crt_export

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "engines" / "cpp"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CPP / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cpp_test_passes_and_none_is_left_out(cpp_build: Path, tiny: Path, windowed: Path) -> None:
    # Under the sanitizers' Python this program checks for leaks, which Python itself cannot be checked for.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}
    environment |= {"CRT_TEST_BUNDLE": str(tiny), "CRT_TEST_WINDOW_BUNDLE": str(windowed)}
    result = subprocess.run(
        [cpp_build / "tests" / "crt_runtime_tests", "--no-intro"],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "left out" not in result.stdout
    match = re.search(r"test cases: +(\d+) \| +(\d+) passed", result.stdout)
    assert match is not None
    assert int(match[1]) == int(match[2]) > 50


def test_c_header_is_c_and_the_library_links_into_c(cpp_build: Path) -> None:
    assert subprocess.run([cpp_build / "tests" / "crt_c_header"], timeout=60, check=False).returncode == 0


def test_library_exports_its_api_and_nothing_else(cpp_build: Path) -> None:
    names = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", cpp_build / "libcrt_runtime.so"],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    ).stdout.splitlines()
    symbols = [line.split(" ", 2)[2] for line in names if " A " not in line]
    allowed = re.compile(r"crt_\w+$|crt::|(typeinfo|typeinfo name|vtable) for crt::Error$")
    assert [symbol for symbol in symbols if not allowed.match(symbol)] == []
    header = (CPP / "include" / "crt_runtime" / "crt.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^CRT_API [\w* ]*?(crt_\w+)\(", header, re.M))
    assert declared == {symbol for symbol in symbols if symbol.startswith("crt_")}


def test_version_is_the_packages(library: Any) -> None:
    assert library.text("crt_version") == crt_export.__version__


def test_tensor_names_are_those_of_the_graphs() -> None:
    generator = script("tensor_names")
    assert generator.HEADER.read_text(encoding="utf-8") == generator.render(ROOT / "graphs")


def test_every_source_and_test_is_built() -> None:
    lists = "".join((CPP / name / "CMakeLists.txt").read_text(encoding="utf-8") for name in (".", "tests"))
    files = [*(CPP / "src").rglob("*.cpp"), *(CPP / "tests").glob("*.c*")]
    assert [file.name for file in files if not re.search(rf"\b{re.escape(file.name)}\b", lists)] == []


# --- sources of the headers' package
SOURCES = """\
# comment
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://elsewhere.example/
Suites: bookworm
Components: main
Enabled: no
"""


def test_only_sources_of_this_release_are_taken_and_keep_mirror_and_key() -> None:
    assert script("prepare").other_suite(SOURCES, "bookworm", "trixie").splitlines() == [
        "Types: deb",
        "URIs: http://mirror.example/debian",
        "Suites: trixie",
        "Components: main",
        "Signed-By: /usr/share/keyrings/some.gpg",
    ]


def test_one_line_sources_likewise() -> None:
    lines = (
        "deb [signed-by=/k.gpg] http://m.example/debian bookworm main contrib\n"
        "deb-src http://m.example/debian bookworm main\n"
        "# deb http://m.example/debian bookworm main\n"
        "deb http://m.example/security bookworm-security main\n"
    )
    expected = "deb [signed-by=/k.gpg] http://m.example/debian trixie main contrib\n"
    assert script("prepare").other_suite_of_lines(lines, "bookworm", "trixie") == expected


def test_a_user_who_may_not_install_gets_the_packages_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare = script("prepare")
    monkeypatch.setattr(prepare, "missing_packages", lambda: ["doctest-dev"])
    monkeypatch.setattr(prepare.os, "geteuid", lambda: 1000)
    assert prepare.main([str(tmp_path)]) == prepare.MISSING
    assert "apt-get install doctest-dev" in (tmp_path / "missing.txt").read_text(encoding="utf-8")


def test_a_compiler_that_fails_is_named_with_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare = script("prepare")
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho no licence >&2\nexit 4\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=os.pathsep)
    assert prepare.main([str(tmp_path / "out")]) == prepare.MISSING
    assert "c++ fails: no licence" in (tmp_path / "out" / "missing.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("dangling", [True, False])
def test_headers_replace_an_include_that_has_none(tmp_path: Path, dangling: bool) -> None:
    include = tmp_path / "include"
    if dangling:
        include.symlink_to(tmp_path / "nowhere")
    else:
        (include / "empty").mkdir(parents=True)
    script("prepare")._remove(include)
    assert not include.is_symlink()
    assert not include.exists()


def test_finding_tensorrt_keeps_the_names_of_its_caller(tmp_path: Path) -> None:
    names = ("candidates", "prefix", "root_name", "roots", "folders", "system", "missing")
    modules = Path(__file__).parents[2] / "engines" / "cpp" / "cmake"
    program = tmp_path / "find.cmake"
    lines = [f'list(APPEND CMAKE_MODULE_PATH "{modules}")', *(f"set({name} mine)" for name in names)]
    lines += ["find_package(TensorRT QUIET COMPONENTS tensorrt rtx)"]
    changed = 'if(NOT {0} STREQUAL "mine")\nmessage(FATAL_ERROR "{0}: ${{{0}}}")\nendif()'
    lines += [changed.format(name) for name in names]
    lines += [
        f'include("{modules}/shared_library.cmake")',
        "crt_runtime_find_library(FOUND nothing_of_this_name /none)",
    ]
    lines += ['if(FOUND)\nmessage(FATAL_ERROR "found ${FOUND}")\nendif()']
    program.write_text("\n".join(lines), encoding="utf-8")
    result = subprocess.run(["cmake", "-P", program], capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert result.returncode == 0, result.stderr
