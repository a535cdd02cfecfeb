"""The command line: one small file per verb, no logic of its own.

:mod:`~crt_export.cli.app` decides what an error looks like and which exit code it gives;
:mod:`~crt_export.cli.console` is the only place that writes to the terminal. Verbs import what they need when
they run, so that ``crt-export --help`` loads neither torch nor a runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

from crt_export.cli.app import app, run_app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program name; None takes the process's own.

    Returns:
        The exit code: 0 success, 1 parity failed, 2 bad input, 3 environment, 70 a bug, 130 interrupted,
        141 nobody reads stdout any more, 143 terminated (129 by SIGHUP).
    """
    return run_app(app, arguments)
