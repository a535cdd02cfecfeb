"""What huge pages are worth: ``python validate/benchmarks/huge_pages.py BUNDLE``, steps with and without them in turns.

The bundle is measured against a copy of itself whose profiles say ``huge_pages = false``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from crt_export.bench.options import BenchOptions
from crt_export.bench.run import run_bench
from crt_export.bundle.manifest import sealed

MANIFEST = "manifest.json"


def copy_without(bundle: Path, copy: Path) -> None:
    """The same bundle, its CPU targets without huge pages."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    for entry in manifest["targets"].values():
        if entry["profile"]["runtime"] == "onnxruntime":
            entry["profile"]["options"]["huge_pages"] = False
    (copy / MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=10, help="blocks of steps of each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="huge-pages-") as folder:
        copy = Path(folder) / "without"
        copy_without(arguments.bundle, copy)
        for target in ("ort-cpu-fp32", "ort-cpu-int8"):
            options = BenchOptions(target=target, against=(str(copy),), prompt_tokens=(1,), rounds=arguments.rounds)
            report = run_bench(arguments.bundle, options)
            step = next(ratio for ratio in report.ratios if ratio.what == "step")
            loads = [who.load.open_s for who in report.candidates if who.load is not None]
            sys.stdout.write(
                f"{target}: step without / with {step.ratio:.3f} [{step.low:.3f}, {step.high:.3f}], "
                f"opened in {loads[0]:.2f} s with, {loads[1]:.2f} s without\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
