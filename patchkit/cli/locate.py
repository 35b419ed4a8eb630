"""`patchkit locate`: which layers hold what a model says about its subjects, and which to edit."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import ModelOptions, model_options, note, print_json, progress_bars, stdout, zsre_option
from patchkit.cli.numbers import Number, Seed


@click.command("locate")
@click.argument("facts")
@model_options
@click.option("--count", type=click.IntRange(1), metavar="N", default=20, show_default=True, help="Facts to trace.")
@click.option("--noise", type=Number(0, min_open=True), default=3.0, show_default=True, help="Its size.")
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Draws of noise for each fact.")
@click.option("--trial", type=click.IntRange(0), metavar="K", default=0, help="Try values of K facts at every layer.")
@click.option("--seed", type=Seed(), default=0, help="Seed of the noise [default: 0].")
@zsre_option
@click.option("--skip-bad", is_flag=True, help="Leave out bad facts.")
@click.option("--out", metavar="F", help="Write the recommended layers as a recipe, for `apply --recipe F`.")
@click.option("--page", metavar="F", help="Write the curves and a heat map of facts and layers as an HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def command(
    facts: str,
    model: ModelOptions,
    count: int,
    noise: float,
    samples: int,
    trial: int,
    seed: int,
    zsre_target: str,
    skip_bad: bool,
    out: str | None,
    page: str | None,
    as_json: bool,
) -> None:
    """Find out by causal tracing which layers hold what the model says after the prompts in FACTS.

    The subject is made unreadable by noise, and one layer's clean feed-forward output put back: what comes back of the
    model's own answer is that layer's share. Nothing is edited; targets do not matter, but for --trial.
    """
    from patchkit.cli.jobs import locate_facts
    from patchkit.cli.tables import located_table
    from patchkit.io.files import write_text
    from patchkit.report.locations import locations_page
    from patchkit.report.page import check_file, write_page

    if page:
        check_file(Path(page), "--page")
    with progress_bars() as progress:
        found = locate_facts(
            facts,
            model.choice(),
            count=count,
            noise=noise,
            samples=samples,
            seed=seed,
            trial=trial,
            zsre_target=zsre_target,
            skip_bad=skip_bad,
            progress=progress,
            say=note,
        )
    if out:
        write_text(Path(out), found.recipe)
    if page:
        write_page(locations_page(found), Path(page))
    if as_json:
        print_json(found.model_dump_json())
    else:
        stdout.print(located_table(found))
        stdout.print(f"recommended: --layers {found.recommended}{f' (recipe: {out})' if out else ''}", soft_wrap=True)
