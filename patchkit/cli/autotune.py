"""`patchkit autotune`: how much goes into a pass on this device."""

from __future__ import annotations

import json

import click

from patchkit.cli.common import ModelOptions, model_options, print_json, progress_bars, stdout


@click.command("autotune")
@model_options
@click.option("--forget", is_flag=True, help="Measure nothing: go back to what suits the kind of device.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: ModelOptions, forget: bool, as_json: bool) -> None:
    """Measure once how many tokens a pass is to have on this device, for models of this one's shape.

    Later runs there read it from the user's cache; without it they take what suits most processors, or most GPUs. What
    they edit stays the same but for rounding: the same facts share passes otherwise.
    """
    from patchkit.cli.jobs import forget_passes, tune_passes
    from patchkit.cli.tables import tuned_table

    if forget:
        device = forget_passes(model.choice())
        if as_json:
            print_json(json.dumps({"forgotten": device}, ensure_ascii=False))
        else:
            stdout.print(f"forgotten: passes on {device}", soft_wrap=True)
        return
    with progress_bars() as progress:
        found = tune_passes(model.choice(), progress)
    if as_json:
        print_json(found.model_dump_json())
        return
    stdout.print(tuned_table(found))
    stdout.print(f"kept for later runs: {found.file}", soft_wrap=True)
