"""`patchkit diff`: how two patches differ."""

from __future__ import annotations

import click

from patchkit.cli.common import (
    print_json,
    stdout,
)


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(a: str, b: str, as_json: bool) -> None:
    """Show what patch B has that patch A lacks, and the other way round: facts, updates, metrics."""
    from patchkit.cli.tables import diff_table
    from patchkit.io.hub import patch_folder
    from patchkit.patch.history import difference
    from patchkit.patch.patch import read_manifest

    found = difference(*(read_manifest(patch_folder(name, manifest_only=True)) for name in (a, b)))
    if as_json:
        print_json(found.model_dump_json())
    else:
        stdout.print(diff_table(found, a, b), soft_wrap=True)
