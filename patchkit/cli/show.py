"""`patchkit show`: what a patch holds."""

from __future__ import annotations

import click

from patchkit.cli.common import (
    print_json,
    stdout,
)


@click.command("show")
@click.argument("patch")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(patch: str, as_json: bool) -> None:
    """Show base, updates and facts of PATCH."""
    from patchkit.cli.tables import patch_table
    from patchkit.io.hub import patch_folder
    from patchkit.patch.stored import read_stored

    stored = read_stored(patch_folder(patch, manifest_only=True))
    if as_json:
        print_json(stored.text)
    else:
        stdout.print(patch_table(stored), crop=False)
