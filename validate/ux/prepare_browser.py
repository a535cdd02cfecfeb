"""Install the browser that the report is looked at with: python validate/ux/prepare_browser.py build/browser.

Debian's chromium; root installs it where no Chromium or Chrome is found. Where that cannot be done: exit code 3, and
the reason on stderr and in missing.txt of the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = 3
_HOW = "looking at the report needs a browser: apt-get install chromium, or set CRT_EXPORT_BROWSER to one"


def main(arguments: list[str]) -> int:
    """Do everything; the argument is the folder for the reason."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "missing.txt"
    note.unlink(missing_ok=True)
    problem = "" if found_browser() else _install()
    if not problem and not found_browser():
        problem = f"{_HOW} (the package was installed and brought none of {', '.join(NAMES)})"
    if problem:
        note.write_text(f"{problem}\n", encoding="utf-8")
        sys.stderr.write(f"{problem}\n")
        return MISSING
    return 0


def found_browser() -> str | None:
    """The browser of this machine."""
    return os.environ.get("CRT_EXPORT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def _install() -> str:
    """Install Debian's package; the problem, empty where there was none."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return _HOW
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # dejavu: without any font a headless machine shows no text.
    install = ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core"]
    for command in (["update"], install):
        # update may fail for a source that is not needed.
        result = subprocess.run(["apt-get", *command], env=environment, stdout=sys.stderr, check=False)
    return f"{_HOW} (apt-get failed with exit code {result.returncode})" if result.returncode != 0 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
