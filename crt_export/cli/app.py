"""The command group, and what becomes of a failure: one message on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence

import click

from crt_export import __version__
from crt_export.cli.bench import bench
from crt_export.cli.build import build, init
from crt_export.cli.console import write_message
from crt_export.cli.convert import convert
from crt_export.cli.doctor import doctor, targets
from crt_export.cli.generate import generate
from crt_export.cli.inspect import inspect
from crt_export.cli.report import compare, report
from crt_export.cli.selftest import selftest
from crt_export.cli.signing import sign, verify
from crt_export.cli.streams import EXIT_BROKEN_PIPE, checked_streams
from crt_export.cli.validate import validate
from crt_export.errors import CrtExportError, MissingDependencyError
from crt_export.termination import Terminated, termination_raises

EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_BUG, EXIT_INTERRUPTED = 2, 3, 70, 130
_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENOMEM}


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 parity failed, 2 bad input, 3 environment, 70 a bug, 130 interrupted, "
    "141 nobody reads stdout any more, 143 terminated (129 by SIGHUP).",
)
@click.version_option(__version__, prog_name="crt-export")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Export a trained context-ready transformer from PyTorch to a verified deployment."""


for command in (
    init, convert, build, validate, bench, report, compare, selftest, generate, inspect, sign, verify, targets, doctor,
):  # fmt: skip
    app.add_command(command)


def run_app(app: click.Group, arguments: Sequence[str] | None) -> int:
    """Parse and run; turn whatever goes wrong into one message on stderr and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with checked_streams() as (_, messages):
        code = _run(app, arguments)
        if messages.lost is None or code != 0:
            return code
    return EXIT_BROKEN_PIPE if isinstance(messages.lost, BrokenPipeError) else EXIT_ENVIRONMENT


def _run(app: click.Group, arguments: list[str]) -> int:
    try:
        with termination_raises():
            return _invoke(app, arguments)
    except Terminated as ended:
        write_message("terminated")
        return ended.exit_code


def _invoke(app: click.Group, arguments: list[str]) -> int:
    debug = "--debug" in arguments[:1]
    try:
        with app.make_context("crt-export", arguments, obj=tuple(arguments)) as context:
            app.invoke(context)
        return 0
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        write_message("interrupted")
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
        write_message(f"error: {known}")
        return known.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS):
        write_message(f"error: this machine ran out of something: {error or 'memory'}")
        return EXIT_ENVIRONMENT
    write_message(
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
