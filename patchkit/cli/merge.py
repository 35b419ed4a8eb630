"""`patchkit merge`: patches and their base in, a checkpoint of its own out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchkit.cli.common import (
    base_of,
    note,
    print_json,
    quiet_transformers,
    stdout,
)
from patchkit.cli.narrow import Adapting
from patchkit.errors import InputError
from patchkit.words import agreeing, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchkit.export.record import Merged, Rounding
    from patchkit.patch.patch import Patch

_WIDE = 110
"""Columns of text that the table of weights takes with their names whole."""
_ERRORS = "errors: what rounding does to the change, as a share of it; in brackets, were each number rounded to nearest"
LOSSY = 0.1
"""An error of a merged GGUF tensor, relative to the change, from which on the adapter is recommended."""


@click.command("merge")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@click.option("--model", "base", metavar="BASE", help="Folder or cached Hub name [default: the base the patch names].")
@click.option(
    "--out", required=True, metavar="DIR", help="Folder, new or empty, of the merged checkpoint; or GGUF file."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["safetensors", "gguf"]),
    default="safetensors",
    show_default=True,
    help="gguf: BASE is a GGUF file, and --out the one to write.",
)
@click.option(
    "--rounding",
    type=click.Choice(["keys", "nearest"]),
    help="How weights go back to their dtype [default: keys in 16 bits, nearest in more].",
)
@click.option("--stats", metavar="DIR", help="From `patchkit stats --out`, for --rounding keys [default: the cache].")
@click.option("--force", is_flag=True, help="Merge although the base's weights are not those the patch was made for.")
@click.option("--link", is_flag=True, help="Hard-link the weight files that no patch touches instead of copying them.")
@click.option("--no-check", is_flag=True, help="Do not load the result to see which facts hold.")
@click.option("--json", "as_json", is_flag=True, help="Print the merge's manifest as JSON.")
def command(
    patches: tuple[str, ...],
    base: str | None,
    out: str,
    kind: str,
    rounding: Rounding | None,
    stats: str | None,
    force: bool,
    link: bool,
    no_check: bool,
    as_json: bool,
) -> None:
    """Write BASE with every PATCH merged into it, in the order given, to a folder that transformers loads by itself.

    Works on the checkpoint's files: whatever is not a touched weight is copied as it is.
    """
    from patchkit.cli.jobs import merge_patches
    from patchkit.patch.patch import Patch

    quiet_transformers()
    loaded = [Patch.load(patch) for patch in patches]
    if kind == "gguf":
        base = base or base_of(loaded[0].manifest.base)
        if not base.endswith(".gguf") or rounding or stats or force or link:
            raise InputError("--format gguf: give --model BASE.gguf, and no --rounding, --stats, --force or --link")
        _merge_gguf(loaded, base, out, as_json)
        return
    merged = merge_patches(
        loaded,
        base or base_of(loaded[0].manifest.base),
        Path(out),
        rounding=rounding,
        stats=stats,
        force=force,
        link=link,
        ask=not no_check,
        say=note,
    )
    if as_json:
        print_json(merged.model_dump_json(indent=1))
    else:
        show_merged(merged, out)


def _merge_gguf(patches: Sequence[Patch], base: str, out: str, as_json: bool) -> None:
    from rich.table import Table

    from patchkit.export.merge_gguf import merge_gguf

    merged = merge_gguf(patches, base, out, note)
    if as_json:
        print_json(merged.model_dump_json(indent=1))
        return
    table = Table("tensor", "type", "unchanged", "error", box=None, pad_edge=False, header_style="bold")
    for t in merged.tensors:
        table.add_row(t.tensor, t.kind, f"{t.unchanged:.1%}", f"{t.error:.1e} of the change")
    stdout.print(table)
    if (worst := max(t.error for t in merged.tensors)) > LOSSY:
        note(f"rounding is {worst:.0%} of a change there: `patchkit export --format gguf` keeps all of it")
    stdout.print(f"file: {out}; which facts hold there was not asked", soft_wrap=True)


def show_merged(merged: Merged, out: str) -> None:
    """What became of every weight and of the facts."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("weight", "rounding", "unchanged", "error on keys (nearest)", "on text (nearest)"):
        table.add_column(heading, justify="left" if heading == "weight" else "right", overflow="fold")
    for t in merged.tensors:
        errors = ((t.key_error, t.key_error_nearest), (t.text_error, t.text_error_nearest))
        shares = ("-" if a is None or b is None else f"{a:.1e} ({b:.1e})" for a, b in errors)
        table.add_row(t.weight, f"{t.rounding}, {t.dtype}", f"{t.unchanged:.1%}", *shares)
    stdout.print(Adapting(table, _WIDE))
    if any(t.key_error is not None for t in merged.tensors):
        stdout.print(_ERRORS, style="dim", soft_wrap=True)
    if merged.facts:
        hold = merged.facts.hold
        verb = agreeing(hold, "hold")
        stdout.print(f"facts: {hold} of {merged.facts.asked} {verb}{_before(merged)}", soft_wrap=True)
    stdout.print(f'checkpoint: {out} (`patchkit generate --model {out} "..."` tries it)', soft_wrap=True)


def _before(merged: Merged) -> str:
    """Which facts do not hold, and how many of them did with the only patch attached, before weights were rounded."""
    assert merged.facts is not None
    told = {fact.id: fact.in_short for manifest in merged.parents for fact in manifest.facts}
    lost = f"; not: {listed([told.get(name, name) for name in merged.facts.lost])}" if merged.facts.lost else ""
    outcomes = merged.parents[0].outcomes if len(merged.parents) == 1 else {}
    before = sum(outcome.holds for outcome in outcomes.values())
    return lost + (f"; with the patch attached: {before} of {len(outcomes)}" if outcomes else "")
