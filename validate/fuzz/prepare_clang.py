"""Install the compiler of the libFuzzer targets: python validate/fuzz/prepare_clang.py build/clang.

Debian's clang with its runtime; root installs them where no clang++ makes a program with libFuzzer. Where that cannot
be done: exit code 3, and the reason on stderr and in missing.txt of the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

MISSING = 3
PACKAGES = ("clang", "libclang-rt-dev")
_HOW = f"libFuzzer needs clang with its runtime: apt-get install {' '.join(PACKAGES)}"
_PROBE = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'


def main(arguments: list[str]) -> int:
    """Do everything; the argument is the folder for the reason."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "missing.txt"
    note.unlink(missing_ok=True)
    problem = "" if makes_fuzzers(folder) else _install()
    if not problem and not makes_fuzzers(folder):
        problem = f"{_HOW} (the packages were installed, and clang++ makes no program with libFuzzer)"
    if problem:
        note.write_text(f"{problem}\n", encoding="utf-8")
        sys.stderr.write(f"{problem}\n")
        return MISSING
    return 0


def makes_fuzzers(folder: Path) -> bool:
    """Whether this machine's clang++ links libFuzzer and the sanitizers."""
    if shutil.which("clang++") is None:
        return False
    command = ["clang++", "-fsanitize=fuzzer,address,undefined", "-x", "c++", "-", "-o", str(folder / "probe")]
    return subprocess.run(command, input=_PROBE, text=True, capture_output=True, check=False).returncode == 0


def _install() -> str:
    """Install Debian's packages; the problem, empty where there was none."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return _HOW
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        # update may fail for a source that is not needed.
        result = subprocess.run(["apt-get", *command], env=environment, stdout=sys.stderr, check=False)
    return f"{_HOW} (apt-get failed with exit code {result.returncode})" if result.returncode != 0 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
