"""What a run on a machine with a GPU found, beyond passed and failed: JSON lines in $CRT_EXPORT_DEVICE_FACTS."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``note(**facts)``: keep figures or a runtime's own words for the result file (see run.py)."""

    def write(**facts: Any) -> None:
        target = os.environ.get("CRT_EXPORT_DEVICE_FACTS")
        if target:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": request.node.name, **facts}) + "\n")

    return write
