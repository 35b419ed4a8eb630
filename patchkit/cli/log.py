"""`patchkit log`: the history of a patch."""

from __future__ import annotations

import json

import click

from patchkit.cli.common import (
    print_json,
    stdout,
)


@click.command("log")
@click.argument("patch")
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def command(patch: str, as_json: bool) -> None:
    """Show every run that made PATCH, newest first."""
    from patchkit.cli.tables import log_table
    from patchkit.io.hub import patch_folder
    from patchkit.patch.patch import read_manifest

    manifest = read_manifest(patch_folder(patch, manifest_only=True))
    if as_json:
        print_json(json.dumps([run.model_dump(mode="json") for run in manifest.history], indent=1))
    else:
        stdout.print(log_table(manifest), soft_wrap=True)
