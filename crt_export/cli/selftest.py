"""``crt-export selftest``: whether this machine computes what PyTorch computed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crt_export.cli.console import ProgressLine, reserved_stdout, write_json, write_table, write_text
from crt_export.cli.options import PATH, json_option, junit_option

if TYPE_CHECKING:
    from crt_export.selftest import SelftestReport, TargetResult


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--target", "targets", multiple=True, metavar="NAME", help="This target must run; may be repeated.")
@junit_option
@json_option
def selftest(bundle: Path, targets: tuple[str, ...], junit: Path | None, as_json: bool) -> None:
    """Replay the vectors in BUNDLE, made by PyTorch FP32, on this machine; needs no PyTorch.

    Exit codes: 0 every target that runs here passed, 1 a target is off, 2 the bundle is unusable or has no vectors,
    3 no target runs here, or one named by --target does not.
    """
    from crt_export.report.junit import write_junit
    from crt_export.report.output import check_outputs
    from crt_export.selftest import run_selftest
    from crt_export.selftest.results import junit_cases

    check_outputs([junit], inputs=[bundle])
    start = time.perf_counter()
    with reserved_stdout(as_json), ProgressLine() as progress:
        report = run_selftest(bundle, targets, progress=progress)
    seconds = time.perf_counter() - start
    if junit is not None:
        write_junit(junit, junit_cases(report))
    if as_json:
        write_json({**report.to_dict(), "seconds": round(seconds, 3)})
    else:
        _write_report(report, seconds)
    if not report.passed:
        raise click.exceptions.Exit(report.exit_code)


def _write_report(report: SelftestReport, seconds: float) -> None:
    rows = [row for target in report.targets for row in _rows(target)]
    write_table(("target", "replay", "tensor", "largest error>", "limit>", "where", "result"), rows)
    for failure in report.failures:
        write_text(f"off: {failure}")
    for target in report.targets:
        if target.status == "not run":
            write_text(f"not run here: {target.target}: {target.reason}")
    if not report.validated:
        write_text("note: this bundle was never shown to agree with PyTorch on text; loaders refuse it")
    ran = sum(target.status != "not run" for target in report.targets)
    verdict = {0: "passed", 1: "FAILED"}.get(report.exit_code, "NOT PASSED: nothing is off, but not everything ran")
    write_text(f"self-test: {verdict if ran else 'NOT PASSED: no target runs here'} ({ran} targets, {seconds:.1f} s)")


def _rows(target: TargetResult) -> list[tuple[str, ...]]:
    """A line per replay, with its worst tensor; one line for a target that did not run."""
    if target.status == "not run":
        return [(target.target, "-", "-", "-", "-", "", "not run here")]
    rows = []
    for replay in target.replays:
        result = "off" if replay.failures else "passed"
        worst = max(replay.tensors, key=lambda tensor: (tensor.largest != tensor.largest, tensor.largest), default=None)
        if worst is None:
            rows.append((target.target, replay.replay, "all", "-", "same bits", "", result))
        else:
            figures = (worst.tensor, f"{worst.largest:.2g}", f"{worst.limit:g}", worst.where)
            rows.append((target.target, replay.replay, *figures, result))
    return rows
