"""The installed package in its other forms: static, and moved to another folder with its ONNX Runtime beside it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "02_embed_cpp"
GOLDEN = ROOT / "validate" / "golden" / "bundle-v1"

# Each builds the library again; make cpp builds and runs the usual form, a shared library.
pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("cpp_build"), pytest.mark.timeout(600)]


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def onnxruntime_root() -> str:
    folder = os.environ.get("ONNXRUNTIME_ROOT", str(ROOT / "build" / "onnxruntime"))
    return f"-DONNXRUNTIME_ROOT={folder}"


def install(folder: Path, *options: str) -> Path:
    """Build the library with these options; the folder it is installed in."""
    build = folder / "build"
    run("cmake", "-S", ROOT / "engines" / "cpp", "-B", build, "-G", "Ninja", onnxruntime_root(), *options)
    run("cmake", "--build", build, "--parallel", "2")
    run("cmake", "--install", build, "--prefix", folder / "installed")
    return folder / "installed"


def embed(folder: Path, package: Path, *options: str) -> Path:
    """Build the example against an installed package; the program."""
    run("cmake", "-S", EXAMPLE, "-B", folder, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={package}", *options)
    run("cmake", "--build", folder)
    return folder / "embed_cpp"


def refuses_nothing_there(program: Path, folder: Path) -> None:
    """The program starts, finds its libraries and answers."""
    result = subprocess.run(
        [program, folder / "nothing", "a"], capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (1, f"error: no such bundle folder: {folder / 'nothing'}\n")


def passes_its_self_test(package: Path) -> None:
    """The installed program runs, wherever the folder was moved to."""
    assert "self-test: passed (2 targets" in run(package / "bin" / "crt-selftest", GOLDEN)


def test_a_static_library_links_with_what_find_package_brings(tmp_path: Path) -> None:
    package = install(tmp_path, "-DBUILD_SHARED_LIBS=OFF", "-DCRT_RUNTIME_TESTS=OFF")
    assert [file.name for file in package.rglob("libcrt_runtime*")] == ["libcrt_runtime.a"]
    refuses_nothing_there(embed(tmp_path / "app", package, onnxruntime_root()), tmp_path)
    passes_its_self_test(package)


def test_a_moved_installation_finds_its_onnxruntime_and_names_no_other_folder(tmp_path: Path) -> None:
    package = install(tmp_path, "-DCRT_RUNTIME_INSTALL_ONNXRUNTIME=ON", "-DCRT_RUNTIME_TESTS=OFF")
    moved = package.rename(tmp_path / "moved")
    (library,) = [file for file in moved.rglob("libcrt_runtime.so.*") if not file.is_symlink()]
    assert "[$ORIGIN]" in next(line for line in run("readelf", "-d", library).splitlines() if "RUNPATH" in line)
    refuses_nothing_there(embed(tmp_path / "app", moved), tmp_path)
    passes_its_self_test(moved)
    headers = "".join(file.read_text(encoding="utf-8") for file in moved.rglob("include/**/*.h*"))
    assert "nlohmann" not in headers
    assert "onnxruntime" not in headers
