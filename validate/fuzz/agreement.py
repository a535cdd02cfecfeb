"""Where Python and C++ must come to the same verdict, and where they need not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Stages whose verdicts differ harmlessly: kind, stage, what Python and C++ may say, and why.
ALLOWED: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "sidecar", "sidecar", "refused", "accepted",
        "Python compares a sidecar with its target and the contract where it reads it, C++ when the engine is loaded: "
        "check_sidecar() and engine_problems() of tensorrt_sidecar.cpp",
    ),
    (
        "snapshot", "load", "refused", "accepted",
        "Python looks for names and shapes that no session has where it loads a file, C++ where a session restores it: "
        "_form_problems() of snapshot_file.py and shape_problems() of snapshot.cpp",
    ),
)  # fmt: skip


def disagreement(kind: str, python: Mapping[str, Any], cpp: Mapping[str, Any]) -> str:
    """The first stage that both languages came to and judged differently; "" if there is none."""
    here, there = python.get("verdicts", {}), cpp.get("verdicts", {})
    for stage in here:
        if stage not in there or here[stage] == there[stage]:
            continue
        if any((kind, stage, here[stage], there[stage]) == known[:4] for known in ALLOWED):
            continue
        reasons = [answer.get("reasons", {}).get(stage, "") for answer in (python, cpp)]
        return f"{stage}: Python {here[stage]} ({reasons[0]}), C++ {there[stage]} ({reasons[1]})"
    return ""
