"""Install NVIDIA's TensorRT Python bindings, each version in a folder of its own.

``python install_bindings.py FOLDER [PIP FLAGS]``; ``make bindings`` calls it, and test_tensorrt_api.py reads
FOLDER/<version>. Only the bindings are installed (about 1 MB each): the libraries of TensorRT are not needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: The oldest supported and the newest known release.
VERSIONS = ("10.16.1.11", "11.4.0.106")


def main() -> None:
    folder, *flags = sys.argv[1:]
    for version in VERSIONS:
        target = Path(folder) / version
        if (target / "tensorrt_bindings" / "__init__.py").is_file():
            continue
        requirement = f"tensorrt-cu13-bindings=={version}"
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(target), *flags]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, requirement], check=True)


if __name__ == "__main__":
    main()
