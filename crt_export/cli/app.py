"""The command group."""

from __future__ import annotations

import click

from crt_export import __version__
from crt_export.cli.bench import bench
from crt_export.cli.build import build
from crt_export.cli.compare import compare
from crt_export.cli.convert import convert
from crt_export.cli.doctor import doctor
from crt_export.cli.generate import generate
from crt_export.cli.init import init
from crt_export.cli.inspect import inspect
from crt_export.cli.report import report
from crt_export.cli.selftest import selftest
from crt_export.cli.signing import sign, verify
from crt_export.cli.targets import targets
from crt_export.cli.validate import validate


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
    init,
    convert,
    build,
    validate,
    bench,
    report,
    compare,
    selftest,
    generate,
    inspect,
    sign,
    verify,
    targets,
    doctor,
):
    app.add_command(command)
