"""`patchkit stats`: what methods ask of plain text, ahead of time."""

from __future__ import annotations

import click

from patchkit.cli.common import choice, model_options, note, progress_bars, stdout


@click.command("stats")
@model_options
@click.option("--text", type=click.Path(), help="Plain text [default: a small English one that comes with patchkit].")
@click.option("--out", metavar="DIR", help="Folder to write to, for `apply --stats DIR` [default: the user's cache].")
@click.option("--layers", metavar="L", help="Layers [default: those of the method's default recipe].")
@click.option("--method", metavar="NAME", help="Whose recipe names the layers [default: alphaedit].")
@click.option(
    "--tokens", type=click.IntRange(2), default=100_000, show_default=True, help="Tokens of the text at most."
)
@click.option("--gradients", is_flag=True, help="Also the gradient of the text's loss, which O-Edit and O-Edit+ use.")
def command(
    model_name: str | None,
    device: str,
    dtype: str,
    device_map: str | None,
    text: str | None,
    out: str | None,
    layers: str | None,
    method: str | None,
    tokens: int,
    gradients: bool,
) -> None:
    """Compute the second moments of the keys at every edited layer, in one pass over the text.

    An interrupted run goes on where it stopped; what is already there is not computed again.
    """
    from patchkit.cli.jobs import compute_statistics

    with progress_bars() as progress:
        computed = compute_statistics(
            choice(model_name, device, dtype, device_map),
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
        stdout.print(f"{weight}: {width} x {width} from {tokens_seen:,} tokens{gradient}", soft_wrap=True)
