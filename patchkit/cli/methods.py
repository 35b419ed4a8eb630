"""`patchkit methods`: what there is to choose from."""

from __future__ import annotations

import json
from typing import Any

import click

from patchkit.cli.common import stdout


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with each method's settings.")
def command(as_json: bool) -> None:
    """List the editing methods with their papers, equations and settings, then what can go around them: memit+nas."""
    from patchkit.cli.tables import methods_table
    from patchkit.methods import available, wrappers

    if as_json:
        described = {name: _described(m) for name, m in available().items()}
        described |= {f"+{name}": _described(w) for name, w in wrappers().items()}
        click.echo(json.dumps(described, indent=1))
    else:
        stdout.print(methods_table(available(), wrappers()))


def _described(chosen: Any) -> dict[str, Any]:
    """A method or wrapper for machines."""
    return {
        "writes": chosen.update,
        "summary": chosen.summary,
        "use_when": chosen.use_when,
        "paper": chosen.paper,
        "equations": chosen.equations,
        "settings": chosen.config.model_json_schema().get("properties", {}),
    }
