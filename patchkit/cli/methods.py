"""`patchkit methods`: what there is to choose from."""

from __future__ import annotations

import json

import click

from patchkit.cli.common import stdout


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with each method's settings.")
def command(as_json: bool) -> None:
    """List the editing methods with their papers, equations and settings."""
    from patchkit.methods import available
    from patchkit.report import methods_table

    known = available()
    if as_json:
        described = {
            name: {
                "writes": m.update,
                "summary": m.summary,
                "use_when": m.use_when,
                "paper": m.paper,
                "equations": m.equations,
                "settings": m.config.model_json_schema()["properties"],
            }
            for name, m in known.items()
        }
        click.echo(json.dumps(described, indent=1))
    else:
        stdout.print(methods_table(known))
