"""`patchkit verify`: measure a patch, and fail when it is not good enough."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import choice, model_options, progress_bars, stdout, zsre_option

SHARE = click.FloatRange(0, 1)


@click.command("verify")
@click.argument("patch")
@model_options
@click.option("--facts", metavar="F", help="Measure these facts [default: those in the patch].")
@click.option(
    "--text", type=click.Path(), help="Plain text for the perplexity [default: a small one that comes along]."
)
@zsre_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--min-efficacy", type=SHARE, metavar="X", help="Least share of facts whose every target token is the argmax."
)
@click.option("--min-generalization", type=SHARE, metavar="X", help="Least share of paraphrases with P(new) > P(true).")
@click.option(
    "--min-locality", type=SHARE, metavar="X", help="Least share of neighbours that stay as the base has them."
)
@click.option("--max-perplexity-ratio", type=float, metavar="X", help="Most that plain text's perplexity may grow by.")
def command(
    patch: str,
    model_name: str | None,
    device: str,
    dtype: str,
    facts: str | None,
    text: str | None,
    zsre_target: str,
    as_json: bool,
    min_efficacy: float | None,
    min_generalization: float | None,
    min_locality: float | None,
    max_perplexity_ratio: float | None,
) -> None:
    """Measure PATCH against the untouched base model; exit with 1 when a gate does not hold.

    Without --model: the base the patch names. Where no fact has a target_true, --min-generalization counts exact
    matches.
    """
    from patchkit.jobs import Gates, verify_patch
    from patchkit.report import apply_table

    gates = Gates(min_efficacy, min_generalization, min_locality, max_perplexity_ratio)
    with progress_bars() as progress:
        report = verify_patch(
            Path(patch),
            lambda base: choice(model_name or base, device, dtype),
            facts=facts,
            text=text,
            zsre_target=zsre_target,
            progress=progress,
        )
    if as_json:
        click.echo(report.model_dump_json())
    else:
        stdout.print(apply_table(report))
    gates.check(report)
