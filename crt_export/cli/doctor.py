"""``crt-export doctor`` and ``targets``: what is installed, what is missing, and what this machine can do with it."""

from __future__ import annotations

import platform
import sys
from typing import Any

import click

from crt_export import __version__
from crt_export.cli.console import write_json, write_message, write_table, write_text
from crt_export.cli.options import json_option
from crt_export.errors import MissingDependencyError

_MEANING = {"run": "builds and runs here", "compile": "builds here", "needs": "needs more"}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this machine: packages, GPUs, and which targets run or compile here."""
    findings = _findings()
    if as_json:
        write_json(findings)
    else:
        _write_findings(findings)
    if findings["problems"]:
        raise click.exceptions.Exit(MissingDependencyError.exit_code)


def _findings() -> dict[str, Any]:
    from crt_export.environment import (
        DEPENDENCIES,
        environment_problems,
        gpus,
        onnxruntime_distributions,
        target_status,
    )
    from crt_export.profile import list_profiles

    return {
        "crt_export": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "executable": sys.executable,
        "packages": [
            {
                "name": dependency.distribution,
                "version": dependency.version,
                "extra": dependency.extra,
                "install": dependency.install,
                "needed_for": dependency.purpose,
            }
            for dependency in DEPENDENCIES
        ],
        "onnxruntime": list(onnxruntime_distributions()),
        "gpus": [{"name": gpu.name, "compute_capability": gpu.compute_capability} for gpu in gpus()],
        "targets": [
            {"name": status.profile.name, "status": status.status, "needs": list(status.needs)}
            for status in map(target_status, list_profiles())
        ],
        "problems": environment_problems(),
    }


def _write_findings(findings: dict[str, Any]) -> None:
    write_text(f"crt-export {findings['crt_export']}, Python {findings['python']}, {findings['platform']}")
    gpus = [f"{gpu['name']} (SM {gpu['compute_capability'] / 10:.1f})" for gpu in findings["gpus"]]
    write_text(f"NVIDIA GPUs: {', '.join(gpus) or 'none'}\n")
    packages = [
        (
            package["name"],
            package["version"] or "-",
            package["needed_for"],
            package["install"],
        )
        for package in findings["packages"]
    ]
    write_table(("package", "version", "needed for", "install with"), packages)
    if findings["onnxruntime"]:
        write_text(f"ONNX Runtime comes from {' and '.join(findings['onnxruntime'])}")
    write_text("")
    targets = [(target["name"], target["status"], "; ".join(target["needs"])) for target in findings["targets"]]
    write_table(("target", "here", "needs"), targets)
    for problem in findings["problems"]:
        write_message(f"problem: {problem}")


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the targets a bundle can be built for."""
    from crt_export.environment import target_status
    from crt_export.profile import list_profiles

    statuses = [target_status(profile) for profile in list_profiles()]
    if as_json:
        write_json(
            {
                "targets": [
                    {"status": s.status, "needs": list(s.needs), "profile": s.profile.to_dict()} for s in statuses
                ]
            }
        )
        return
    rows = [(s.profile.name, s.profile.precision, _MEANING[s.status], s.profile.title) for s in statuses]
    write_table(("target", "precision", "here", "title"), rows)
    write_text("A profile of your own: --target FILE.toml (see engines/README.md). What is missing: doctor.")
