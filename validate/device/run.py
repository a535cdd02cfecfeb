"""Run the tests that need a GPU and write down what they found: ``python validate/device/run.py [RESULT.json]``.

The result holds date, hardware, versions, the outcome of every test with the reason of every skip, and the figures
and answers that the tests noted. Nothing is downloaded; what is not installed is skipped with its reason.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from crt_export.environment import DEPENDENCIES, gpus

HERE = Path(__file__).resolve().parent


def main() -> int:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "build" / "device.json"
    with tempfile.TemporaryDirectory() as folder:
        facts, report = Path(folder) / "facts.jsonl", Path(folder) / "report.xml"
        facts.touch()
        command = [sys.executable, "-m", "pytest", str(HERE), "-v", f"--junitxml={report}"]
        environment = {**os.environ, "CRT_EXPORT_DEVICE_FACTS": str(facts)}
        code = subprocess.run(command, cwd=HERE.parents[1], env=environment, check=False).returncode
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": {"python": platform.python_version(), **versions()},
            "passed": code == 0,
            "tests": outcomes(report),
            "noted": [json.loads(line) for line in facts.read_text(encoding="utf-8").splitlines()],
        }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")
    return code


def hardware() -> dict[str, Any]:
    """The machine, as far as it says; nvidia-smi adds what the driver library does not."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "gpus": [{"name": gpu.name, "compute_capability": gpu.compute_capability} for gpu in gpus()],
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return found


def versions() -> dict[str, str]:
    return {dependency.distribution: version for dependency in DEPENDENCIES if (version := dependency.version)}


def outcomes(report: Path) -> list[dict[str, str]]:
    """Name, outcome and reason of every test."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        reason = next(iter(case), None)
        found.append(
            {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "outcome": "passed" if reason is None else reason.tag,
                "reason": "" if reason is None else (reason.get("message") or ""),
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
