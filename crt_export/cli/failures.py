"""What an error looks like on the command line, and which exit code it gives."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from crt_export.errors import CrtExportError, MissingDependencyError
from crt_export.termination import Terminated, termination_raises

EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
# What a shell reports for a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141

_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENOMEM}


def run_app(app: click.Group, arguments: Sequence[str] | None) -> int:
    """Parse and run; turn whatever goes wrong into one message on stderr and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments[:1]
    try:
        with termination_raises():
            return _run(app, arguments, debug)
    except Terminated as ended:
        with contextlib.suppress(OSError):  # the terminal has gone, if that is what ended it
            _say("terminated")
        return ended.exit_code


def _run(app: click.Group, arguments: list[str], debug: bool) -> int:
    try:
        with app.make_context("crt-export", arguments, obj=tuple(arguments)) as context:
            app.invoke(context)
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:  # the one place that catches all: every error leaves as a message and a code
        if debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Print the message of an error; return its exit code."""
    if isinstance(error, click.ClickException):
        error.show(sys.stderr)
        return EXIT_USAGE
    known = _known_error(error)
    if known is not None:
        _say(f"error: {known}")
        return known.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS):
        _say(f"error: this machine ran out of something: {error or 'memory'}")
        return EXIT_ENVIRONMENT
    _say(
        f"error: unexpected {type(error).__name__}: {error}\n"
        "This is a bug in crt-export: please report it with the output of 'crt-export --debug ...' and "
        "'crt-export doctor'."
    )
    return EXIT_BUG


def _known_error(error: Exception) -> CrtExportError | None:
    """The deliberate error behind an exception, if there is one."""
    if isinstance(error, CrtExportError):
        return error
    if isinstance(error, ModuleNotFoundError):
        from crt_export.environment import missing_module_error

        return missing_module_error(error.name, "this command")
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "crt_export":
        return MissingDependencyError(f"an installed package cannot be loaded: {error}; see 'crt-export doctor'")
    return None


def _say(message: str) -> None:
    click.echo(message, err=True)


def _abandon_stdout() -> None:
    """Nobody reads stdout any more: keep the interpreter from failing when it flushes at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no real file, so nothing will be flushed to it
        return
