"""`patchkit report`: one HTML page that shows what a patch or a benchmark did."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

import click

from patchkit.cli.common import (
    ModelOptions,
    model_options,
    note,
    print_json,
    progress_bars,
    quick_option,
    stdout,
)


@click.command("report")
@click.argument("source", metavar="PATCH|DIR")
@model_options
@click.option("--facts", metavar="F", help="Measure a patch on these facts [default: those in the patch].")
@click.option("--text", type=click.Path(), help="Plain text for the perplexity of a patch.")
@click.option("--measured", metavar="F", help="What `verify --json` or `apply --json` printed, instead of measuring.")
@quick_option
@click.option("--out", metavar="FILE", help="The page [default: <name>-report.html here].")
@click.option("--png", metavar="DIR", help="Put pictures there, too: facts, what was measured, and each chart as PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print where the page and the pictures are as JSON.")
def command(
    source: str,
    model: ModelOptions,
    facts: str | None,
    text: str | None,
    measured: str | None,
    quick: bool,
    out: str | None,
    png: str | None,
    as_json: bool,
) -> None:
    """Write one HTML page about a patch, or about a folder that `patchkit bench` has filled.

    It has every fact before and after side by side, those that do not hold first and why, what changed in the texts
    about their subjects, in neighbors and in unrelated answers, and how far the weights moved. It is one file that
    needs no network. A patch is measured for it as `patchkit verify` does, unless --measured has that already.
    """
    from patchkit.cli.reporting import report_page
    from patchkit.report.page import check_file, write_page
    from patchkit.report.pictures import check_place, write_pictures

    file = Path(out or f"{PurePath(source.partition('@')[0]).name}-report.html")
    check_file(file)
    if png:
        check_place(Path(png), "--png")
    with progress_bars() as progress:
        page = report_page(
            source,
            model.choice,
            facts=facts,
            text=text,
            measured=measured,
            quick=quick,
            progress=progress,
            say=note,
        )
    write_page(page, file)
    drawn = write_pictures(page, Path(png)) if png else []
    size = file.stat().st_size
    if as_json:
        print_json(json.dumps({"report": str(file), "bytes": size, "pictures": list(map(str, drawn))}))
        return
    stdout.print(f"report: {file} ({size / 1e3:,.0f} kB; open it in a browser)", soft_wrap=True)
    if png:
        stdout.print(f"pictures: {png} ({len(drawn)})", soft_wrap=True)
