"""`patchkit revert`: facts out of a patch."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import (
    ModelOptions,
    force_option,
    model_options,
    note,
    own_folder,
    place_of_its_own,
    print_json,
    progress_bars,
    stdout,
)
from patchkit.words import counted


@click.command("revert")
@click.argument("patch")
@click.option("--fact", "facts", multiple=True, metavar="ID", help="Take this fact out; may be repeated.")
@click.option(
    "--subject", "subjects", multiple=True, metavar="NAME", help="Take out the fact about NAME; may be repeated."
)
@click.option("--since", metavar="DATE", help="Take out what was added since, such as 2026-01-31 (UTC).")
@click.option("--last", type=click.IntRange(1), metavar="N", help="Take out what the last N runs of apply added.")
@model_options
@click.option(
    "--text", "texts", multiple=True, type=click.Path(), help="A text that apply had with --text; may be repeated."
)
@click.option("--stats", type=click.Path(), help="Folder of statistics, instead of the cache.")
@click.option("--measure", "measured", is_flag=True, help="Measure what remains, which runs the model.")
@click.option("--out", metavar="DIR", help="Write the result here [default: PATCH itself].")
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    patch: str,
    facts: tuple[str, ...],
    subjects: tuple[str, ...],
    since: str | None,
    last: int | None,
    model: ModelOptions,
    texts: tuple[str, ...],
    stats: str | None,
    measured: bool,
    out: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Take facts out of PATCH: those named by id or subject, as `patchkit show` lists them, and those added since a
    date or by the last runs.

    The others are solved for again without them, from the keys and values stored in the patch. The model is loaded to
    find the statistics that belong to it, and runs only where those are missing.
    """
    from patchkit.cli.jobs import revert_patch
    from patchkit.cli.tables import metrics_table, run_text

    folder = Path(out) if out else own_folder(patch)
    with place_of_its_own(folder, patch, force), progress_bars() as progress:
        done = revert_patch(
            patch,
            model.choice,
            folder,
            facts=facts,
            subjects=subjects,
            since=since,
            last=last,
            texts=texts,
            stats=stats,
            measured=measured,
            progress=progress,
            say=note,
        )
    if as_json:
        print_json(done.as_json())
        return
    manifest = done.patch.manifest
    stdout.print(run_text(manifest, len(manifest.history) - 1), soft_wrap=True)
    if done.report:
        stdout.print(metrics_table(done.report))
    stdout.print(
        f"patch: {folder} ({counted(len(manifest.facts), 'fact')} left; `patchkit verify {folder}` measures it)"
    )
