"""What a fuzzed file holds: bytes, and zeros behind them that take no room on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileContent:
    """Bytes, then a hole of that many zeros."""

    data: bytes
    hole: int = 0

    def write(self, path: Path) -> None:
        """Store it; the hole stays sparse."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        if self.hole:
            os.truncate(path, len(self.data) + self.hole)
