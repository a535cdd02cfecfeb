"""Bring together what building the C++ library needs: python engines/cpp/scripts/prepare.py build/onnxruntime.

1. Compiler, CMake, Ninja, nlohmann-json, doctest, OpenSSL. Root installs the Debian packages that are missing.
2. Unless ONNXRUNTIME_ROOT names ONNX Runtime: its library from the wheel installed beside this interpreter, and its C++
   headers, which no wheel carries, from Debian's libonnxruntime-dev. Debian 12 has no such package, so that one is
   taken from Debian 13, through the machine's own apt sources and keys, in a folder of its own: nothing of the system
   changes. Headers older than the library are what ONNX Runtime's API versions are for.

Where something is missing that cannot be got: exit code 3, and the reason on stderr and in missing.txt of the folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = {"cmake": "cmake", "ninja": "ninja-build", "c++": "g++"}
HEADERS = {
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "doctest/doctest.h": "doctest-dev",
    "openssl/evp.h": "libssl-dev",
}
PACKAGE = "libonnxruntime-dev"
HEADER = "onnxruntime_cxx_api.h"
#: The release whose package is taken on a release that has none.
NEXT_SUITE = {"bookworm": "trixie"}
MISSING = 3


class MissingError(Exception):
    """Something is not here and cannot be got; the text says what and how to get it."""


def main(arguments: list[str]) -> int:
    """Do everything; the argument is the folder to make, with include/ and lib/."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    reason = folder / "missing.txt"
    reason.unlink(missing_ok=True)
    try:
        _prepare_packages()
        if not os.environ.get("ONNXRUNTIME_ROOT"):
            _link_library(folder / "lib")
            if not (folder / "include" / HEADER).is_file():
                _prepare_headers(folder)
    except (MissingError, OSError) as error:
        reason.write_text(f"{error}\n", encoding="utf-8")
        print(error, file=sys.stderr)
        return MISSING
    return 0


# --- Debian packages
def missing_packages() -> list[str]:
    """Debian packages of the programs and headers that are not here."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if "g++" in missing:  # without a compiler nobody can say which headers it would find
        return [*missing, *HEADERS.values()]
    probe = "".join(f"#if !__has_include(<{header}>)\n{package}\n#endif\n" for header, package in HEADERS.items())
    try:
        return missing + _output("c++", "-E", "-P", "-x", "c++", "-", text=probe).split()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit code {error.returncode}"
        raise MissingError(f"the C++ library needs a compiler that works, and c++ fails: {reason}") from error


def _prepare_packages() -> None:
    packages = missing_packages()
    if not packages:
        return
    how = f"the C++ library needs {', '.join(packages)}: apt-get install {' '.join(packages)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise MissingError(how)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        # What apt-get says goes to stderr with all other progress; update may fail for a source that is not needed.
        result = subprocess.run(["apt-get", *command], env=environment, stdout=sys.stderr, check=False)
    if result.returncode != 0:
        raise MissingError(f"{how} failed with exit code {result.returncode}")


# --- ONNX Runtime
def _link_library(folder: Path) -> None:
    """The wheel's library under the names that the linker and the loader look for."""
    spec = importlib.util.find_spec("onnxruntime")
    parent = Path(str(spec.origin)).parent / "capi" if spec is not None else None
    libraries = sorted(parent.glob("libonnxruntime.so.*")) if parent is not None else []
    if not libraries:
        raise MissingError("the C++ library needs ONNX Runtime: pip install onnxruntime, or set ONNXRUNTIME_ROOT")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        link = folder / name
        if not link.exists() or link.resolve() != libraries[-1].resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(libraries[-1])


def _prepare_headers(folder: Path) -> None:
    include = folder / "include"
    system = Path("/usr/include/onnxruntime")
    if (system / HEADER).is_file():
        _remove(include)
        include.symlink_to(system)
        return
    how = "the C++ library needs ONNX Runtime's headers: set ONNXRUNTIME_ROOT to an unpacked release of it"
    release = _os_release()
    if release.get("ID") != "debian" or shutil.which("apt-get") is None:
        raise MissingError(f"{how} (this is not Debian, whose {PACKAGE} has them)")
    codename = release.get("VERSION_CODENAME", "")
    unpacked = _unpacked_package(folder / "apt", codename, NEXT_SUITE.get(codename, codename), how)
    found = sorted(unpacked.rglob(HEADER))
    if not found:
        raise MissingError(f"{how} ({PACKAGE} holds no {HEADER})")
    partial = folder / "include.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(found[0].parent, partial)
    _remove(include)
    partial.rename(include)
    shutil.rmtree(folder / "apt")


def _remove(path: Path) -> None:
    """A folder, or a link wherever it leads; nothing at all is fine too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _unpacked_package(root: Path, codename: str, suite: str, how: str) -> Path:
    """Download the package of a suite through an apt of its own, which checks signatures and hashes, and unpack it."""
    shutil.rmtree(root, ignore_errors=True)
    for name in ("state/lists/partial", "cache/archives/partial", "sources", "package"):
        (root / name).mkdir(parents=True)
    root = root.resolve()
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    count = 0
    for file in files:
        if file.is_file() and file.suffix in (".list", ".sources"):
            rewrite = other_suite if file.suffix == ".sources" else other_suite_of_lines
            text = rewrite(file.read_text(encoding="utf-8"), codename, suite)
            (root / "sources" / file.name).write_text(text, encoding="utf-8")
            count += bool(text)
    if not count:
        raise MissingError(f"{how} (no source in /etc/apt has the suite {codename})")
    options = {
        "Dir::State": root / "state",
        "Dir::Cache": root / "cache",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": root / "sources",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",  # the folder may be closed to apt's own user
    }
    apt = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in options.items())]
    _run([*apt, "update"], root)  # a source without this suite fails; what counts is whether the package comes
    status = _run([*apt, "download", PACKAGE], root)
    packages = sorted(root.glob("*.deb"))
    if status != 0 or not packages:
        raise MissingError(f"{how} (apt-get download {PACKAGE} from {suite} failed)")
    if _run(["dpkg-deb", "--extract", str(packages[0]), str(root / "package")], root) != 0:
        raise MissingError(f"{how} (dpkg-deb could not unpack {packages[0].name})")
    return root / "package"


def other_suite(text: str, codename: str, suite: str) -> str:
    """The stanzas of a deb822 file that have the suite ``codename``, with ``suite`` in place of all their suites."""
    kept = []
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
        fields = {line.split(":")[0].strip().lower(): line.split(":", 1)[1] for line in lines if ":" in line}
        disabled = fields.get("enabled", "yes").strip().lower() in ("no", "false", "0")
        if codename in fields.get("suites", "").split() and not disabled:
            kept.append("\n".join(re.sub(r"(?i)^suites:.*", f"Suites: {suite}", line) for line in lines) + "\n")
    return "\n".join(kept)


def other_suite_of_lines(text: str, codename: str, suite: str) -> str:
    """The same for a file of one-line sources."""
    pattern = re.compile(rf"^(deb\s+(?:\[[^\]]*\]\s+)?\S+\s+){re.escape(codename)}(\s+.*)$")
    matches = [pattern.match(line) for line in text.splitlines()]
    return "".join(f"{match[1]}{suite}{match[2]}\n" for match in matches if match)


def _os_release() -> dict[str, str]:
    file = Path("/etc/os-release")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines)}


def _run(command: list[str], folder: Path) -> int:
    return subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False).returncode


def _output(*command: str, text: str) -> str:
    return subprocess.run(command, input=text, capture_output=True, encoding="utf-8", check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
