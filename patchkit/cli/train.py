"""`patchkit train`: the network of a method that learns to edit, once for a model."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from patchkit.cli.common import ModelOptions, model_options, note, print_json, progress_bars, stdout, zsre_option
from patchkit.cli.numbers import Number, Seed
from patchkit.words import counted, numbered


@click.command("train")
@click.argument("facts")
@model_options
@click.option("--method", metavar="NAME", default="mend", show_default=True, help="Whose network.")
@click.option("--recipe", metavar="F", help="A recipe file, or the name of one under recipes/<method>/.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated.")
@click.option("--layers", metavar="L", help="Layers that it is to edit: 4-8, or 4,6, or 14%-27% of the depth.")
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Facts edited in all.")
@click.option("--rank", type=click.IntRange(1), default=128, show_default=True, help="Of the network's layers.")
@click.option("--learning-rate", type=Number(0, min_open=True), default=1e-3, show_default=True, help="Adam's.")
@click.option("--seed", type=Seed(), default=0, help="Of the first weights and of the order of facts [default: 0].")
@click.option("--text", type=click.Path(), help="Plain text that edits are to leave alone.")
@click.option(
    "--stats", type=click.Path(), help="Folder of statistics, where the network is kept, too [default: the cache]."
)
@zsre_option
@click.option("--skip-bad", is_flag=True, help="Leave out bad facts.")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
def command(
    facts: str,
    model: ModelOptions,
    method: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    layers: str | None,
    steps: int,
    rank: int,
    learning_rate: float,
    seed: int,
    text: str | None,
    stats: str | None,
    zsre_target: str,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Train the network of a method that learns to edit (MEND), on FACTS, for a model; `apply --method mend` takes it.

    FACTS should be others than those to be edited later, and many; their paraphrases and neighbors are trained on, too.
    An interrupted training goes on where it stopped, and so does one with more --steps than the last.
    """
    from patchkit.cli.jobs import train_network
    from patchkit.runs.train import TrainConfig

    how = TrainConfig(steps=steps, rank=rank, learning_rate=learning_rate, seed=seed)
    with progress_bars() as progress:
        done = train_network(
            facts,
            model.choice(),
            how,
            method=method,
            recipe=recipe,
            overrides=(*overrides, *([f"layers={layers}"] if layers else [])),
            text=text,
            stats=stats,
            zsre_target=zsre_target,
            skip_bad=skip_bad,
            progress=progress,
            say=note,
        )
    if as_json:
        print_json(json.dumps(asdict(done)))
        return
    where = numbered("layer", done.layers)
    stdout.print(f"network: {done.file} ({where}, {counted(done.steps, 'step')})", soft_wrap=True)
    if done.edit_loss is not None and done.drift is not None:
        stdout.print(
            f"by the end an edit left {done.edit_loss:.3f} nats of loss at its target, and moved other text by "
            f"{done.drift:.4f} nats a token",
            soft_wrap=True,
        )
