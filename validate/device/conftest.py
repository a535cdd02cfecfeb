"""What a run on a machine with a GPU found, beyond passed and failed: JSON lines in $CRT_EXPORT_DEVICE_FACTS."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if str(Path(__file__).parent) not in sys.path:  # for gpu_bench.py; pytest's import mode leaves the path alone
    sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``note(**facts)``: keep figures or a runtime's own words for the result file (see run.py)."""

    def write(**facts: Any) -> None:
        target = os.environ.get("CRT_EXPORT_DEVICE_FACTS")
        if target:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": request.node.name, **facts}) + "\n")

    return write
