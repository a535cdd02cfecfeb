"""Install what make evidence needs of Debian: python validate/prepare.py browser build/browser, or clang build/clang.

``browser`` looks at the report: chromium. ``clang`` compiles the libFuzzer targets: clang with its runtime. Root
installs them where there is none that works. Where that cannot be done: exit code 3, and the reason on stderr and in
missing.txt of the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MISSING = 3
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PROBE = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'


def found_browser(_: Path) -> bool:
    """Whether this machine has a browser."""
    return bool(os.environ.get("CRT_EXPORT_BROWSER")) or any(map(shutil.which, BROWSERS))


def makes_fuzzers(folder: Path) -> bool:
    """Whether this machine's clang++ links libFuzzer and the sanitizers."""
    if shutil.which("clang++") is None:
        return False
    command = ["clang++", "-fsanitize=fuzzer,address,undefined", "-x", "c++", "-", "-o", str(folder / "probe")]
    return subprocess.run(command, input=_PROBE, text=True, capture_output=True, check=False).returncode == 0


#: What tells that it is there, the packages (dejavu: without any font a headless machine shows no text), what to do
#: without them, and what it means that they change nothing.
TOOLS: dict[str, tuple[Callable[[Path], bool], tuple[str, ...], str, str]] = {
    "browser": (
        found_browser,
        ("chromium", "fonts-dejavu-core"),
        "looking at the report needs a browser: apt-get install chromium, or set CRT_EXPORT_BROWSER to one",
        f"the package was installed and brought none of {', '.join(BROWSERS)}",
    ),
    "clang": (
        makes_fuzzers,
        ("clang", "libclang-rt-dev"),
        "libFuzzer needs clang with its runtime: apt-get install clang libclang-rt-dev",
        "the packages were installed, and clang++ makes no program with libFuzzer",
    ),
}


def main(arguments: list[str]) -> int:
    """Do everything; the arguments are the tool and the folder for the reason."""
    works, packages, how, useless = TOOLS[arguments[0]]
    folder = Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "missing.txt"
    note.unlink(missing_ok=True)
    problem = "" if works(folder) else _install(packages, how)
    if not problem and not works(folder):
        problem = f"{how} ({useless})"
    if problem:
        note.write_text(f"{problem}\n", encoding="utf-8")
        sys.stderr.write(f"{problem}\n")
        return MISSING
    return 0


def _install(packages: tuple[str, ...], how: str) -> str:
    """Install Debian's packages; the problem, empty where there was none."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return how
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        # update may fail for a source that is not needed.
        result = subprocess.run(["apt-get", *command], env=environment, stdout=sys.stderr, check=False)
    return f"{how} (apt-get failed with exit code {result.returncode})" if result.returncode != 0 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
