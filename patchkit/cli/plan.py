"""`patchkit plan`: what `apply` would do with the same, and whether the machine has the time and memory for it."""

from __future__ import annotations

import time

import click

from patchkit.cli.apply import request_options, settings, show_planned, source
from patchkit.cli.common import ModelOptions, note, quick_option


@click.command("plan")
@request_options
@quick_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def command(
    facts: str | None,
    typed: tuple[str, ...],
    model: ModelOptions,
    onto: str | None,
    beside: tuple[str, ...],
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
    yes: bool,
    quick: bool,
    as_json: bool,
) -> None:
    """Show what `apply` would edit with these options: facts with their tokens, weights, seconds by phase, memory by
    part, and on which device the model lies.

    Nothing is edited and nothing written. Memory is reckoned from shapes; seconds are those of a few short passes of
    this model on this machine, scaled. `apply --dry-run` does the same.
    """
    began = time.process_time()
    from patchkit.cli.applying import ApplyRequest, dry_run

    overrides = (*overrides, *settings(layers=layers, batch_size=batch_size, seed=seed))
    request = ApplyRequest(
        source(facts, typed), onto, method, recipe, overrides, zsre_target, skip_bad, yes, beside=beside
    )
    show_planned(dry_run(request, model.choice, text=text, stats=stats, quick=quick, began=began, say=note), as_json)
