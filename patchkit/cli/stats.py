"""`patchkit stats`: what methods ask of plain text, ahead of time."""

from __future__ import annotations

import click

from patchkit.cli.common import ModelOptions, model_options, note, progress_bars, stdout
from patchkit.errors import InputError
from patchkit.ranks import world
from patchkit.words import counted


@click.command("stats")
@model_options
@click.option("--text", type=click.Path(), help="Plain text [default: a small English one that comes with patchkit].")
@click.option("--out", metavar="DIR", help="Folder to write to, for `apply --stats DIR` [default: the user's cache].")
@click.option("--layers", metavar="L", help="Layers [default: those of the method's default recipe].")
@click.option("--method", metavar="NAME", help="Whose recipe names the layers [default: alphaedit].")
@click.option(
    "--tokens", type=click.IntRange(2), default=100_000, show_default=True, help="Tokens of the text at most."
)
@click.option("--push", "push_to", metavar="REPO", help="Publish what is in --out on the Hub, once it is computed.")
@click.option("--pull", "pull_from", metavar="REPO", help="Compute nothing: fetch what others published there.")
@click.option("--gradients", is_flag=True, help="Also the gradient of the text's loss, which O-Edit and O-Edit+ use.")
def command(
    model: ModelOptions,
    text: str | None,
    out: str | None,
    layers: str | None,
    method: str | None,
    tokens: int,
    push_to: str | None,
    pull_from: str | None,
    gradients: bool,
) -> None:
    """Compute the second moments of the keys at every edited layer, in one pass over the text.

    An interrupted run goes on where it stopped; what is already there is not computed again.
    """
    from patchkit.cli.jobs import compute_statistics

    if push_to and (out is None or pull_from):
        raise InputError("--push: publishes what is in a folder of its own; give --out DIR, and no --pull")
    if pull_from and not world().first:
        return
    if pull_from:
        _pull(pull_from, out)
        return
    with progress_bars() as progress:
        computed = compute_statistics(
            model.choice(),
            text=text,
            out=out,
            layers=layers,
            method=method,
            tokens=tokens,
            gradients=gradients,
            progress=progress,
            say=note,
        )
    for weight, tokens_seen, width, rank in computed:
        gradient = "" if rank is None else f", gradient of rank {rank}"
        stdout.print(f"{weight}: {width} x {width} from {counted(tokens_seen, 'token')}{gradient}", soft_wrap=True)
    if push_to and world().first:
        from patchkit.statistics.sharing import push_statistics

        assert out is not None
        count, url = push_statistics(out, push_to)
        stdout.print(f"pushed: {counted(count, 'file')} to {url}", soft_wrap=True)


def _pull(repo: str, out: str | None) -> None:
    from patchkit.statistics.sharing import pull_statistics

    for entry in pull_statistics(repo, out):
        origin = entry.origin
        what = f"{origin.kind.replace('_', ' ')} of {origin.weight} from {counted(origin.text.tokens, 'token')}"
        stdout.print(f"{what}, model {origin.model[:12]}", soft_wrap=True)
