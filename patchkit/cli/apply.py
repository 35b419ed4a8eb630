"""`patchkit apply`: facts in, a patch out."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import (
    choice,
    model_options,
    note,
    own_folder,
    progress_bars,
    refuse_place,
    stdout,
    zsre_option,
)


@click.command("apply")
@click.argument("facts")
@model_options
@click.option("--onto", metavar="PATCH", help="Go on from this patch, with its recipe unless told otherwise.")
@click.option("--method", metavar="NAME", help="One of `patchkit methods` [default: alphaedit].")
@click.option("--recipe", metavar="F", help="A recipe file, or the name of one under recipes/<method>/.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated.")
@click.option("--layers", metavar="L", help="Layers to edit: 4-8, or 4,6, or 14%-27% of the depth.")
@click.option("--batch-size", type=click.IntRange(1), help="Facts solved for together; batches follow one another.")
@click.option("--text", type=click.Path(), help="Plain text for the statistics; more is better.")
@click.option("--stats", type=click.Path(), help="Folder of statistics, instead of the cache.")
@click.option("--seed", type=int, help="Seed of the generated contexts [default: 0].")
@zsre_option
@click.option("--skip-bad", is_flag=True, help="Leave out bad facts, list them in rejected.jsonl beside the patch.")
@click.option("--out", metavar="DIR", help="The patch's folder [default: that of --onto, else <name of FACTS>-patch].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def command(
    facts: str,
    model_name: str | None,
    device: str,
    dtype: str,
    onto: str | None,
    method: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    layers: str | None,
    batch_size: int | None,
    text: str | None,
    stats: str | None,
    seed: int | None,
    zsre_target: str,
    skip_bad: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Write FACTS (.jsonl or .json, "-" for standard input) into a model, as a patch.

    The model itself is not changed. Native facts have prompt, subject and target_new; CounterFact and ZsRE files are
    recognised. Afterwards every fact is measured with and without the patch.

    With --onto, facts that PATCH has already are skipped, and a fact with another target supersedes the earlier one.
    """
    from patchkit.jobs import apply_file
    from patchkit.report import apply_table

    usual = own_folder(onto) if onto else Path(f"{Path(facts).stem if facts != '-' else 'stdin'}-patch")
    folder = Path(out) if out else usual
    short = {"layers": layers, "batch_size": batch_size, "seed": seed}
    settings = (*overrides, *(f"{key}={value}" for key, value in short.items() if value is not None))
    refuse_place(folder)
    with progress_bars() as progress:
        done = apply_file(
            facts,
            lambda base: choice(model_name or base, device, dtype),
            folder,
            onto=onto,
            method=method,
            recipe=recipe,
            settings=settings,
            text=text,
            stats=stats,
            zsre_target=zsre_target,
            skip_bad=skip_bad,
            progress=progress,
            say=note,
        )
    if as_json:
        click.echo(done.as_json())
    else:
        stdout.print(apply_table(done.report))
        stdout.print(
            f"patch: {folder} ({done.size / 1e3:,.0f} kB; `patchkit verify {folder}` measures it again)", soft_wrap=True
        )
