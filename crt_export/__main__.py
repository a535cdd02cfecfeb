"""``python -m crt_export`` is ``crt-export``."""

from __future__ import annotations

import sys

from crt_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
