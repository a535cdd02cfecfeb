"""``crt-export targets``: the engine profiles, and what this machine can do with each."""

from __future__ import annotations

import click

from crt_export.cli.console import write_json, write_table, write_text
from crt_export.cli.options import json_option

MEANING = {"run": "builds and runs here", "compile": "builds here", "needs": "needs more"}


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
    rows = [(s.profile.name, s.profile.precision, MEANING[s.status], s.profile.title) for s in statuses]
    write_table(("target", "precision", "here", "title"), rows)
    write_text("A profile of your own: --target FILE.toml (see engines/README.md). What is missing: doctor.")
