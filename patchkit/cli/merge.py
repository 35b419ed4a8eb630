"""`patchkit merge`: patches and their base in, a checkpoint of its own out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchkit.cli.common import note, quiet_transformers, stdout

if TYPE_CHECKING:
    from patchkit.merge import HeldFacts, Merged, Rounding
    from patchkit.patch import Patch


@click.command("merge")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@click.option("--model", "base", metavar="BASE", help="Folder or cached Hub name [default: the base the patch names].")
@click.option("--out", required=True, metavar="DIR", help="Folder of the merged checkpoint; new or empty.")
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
    from patchkit.merge import merge
    from patchkit.patch import Patch

    loaded = [Patch.load(patch) for patch in patches]
    merged = merge(
        loaded,
        base or loaded[0].manifest.base.name,
        out,
        rounding=rounding,
        statistics=stats,
        force=force,
        link=link,
        say=note,
    )
    if not no_check:
        quiet_transformers()
        merged = merged.model_copy(update={"facts": _held(Path(out), loaded)})
        merged.save(Path(out))
    if as_json:
        click.echo(merged.model_dump_json(indent=1))
    else:
        _print(merged, out)


def _held(folder: Path, patches: list[Patch]) -> HeldFacts:
    """Ask the merged checkpoint for every fact; of two patches that answer one prompt, the later one counts."""
    from patchkit.arch import inspect_model
    from patchkit.forward import LayerRunner
    from patchkit.merge import HeldFacts
    from patchkit.models import load_model
    from patchkit.verify import read_targets

    loaded = load_model(str(folder))
    facts = {fact.prompt: fact for patch in patches for fact in patch.manifest.facts}
    pairs = {fact.id: (fact.prompt, fact.target_new) for fact in facts.values()}
    readings = read_targets(LayerRunner(inspect_model(loaded.model)), loaded.tokenizer, list(pairs.values()))
    lost = tuple(name for name, pair in pairs.items() if not readings[pair].exact)
    return HeldFacts(asked=len(pairs), hold=len(pairs) - len(lost), lost=lost)


def _print(merged: Merged, out: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("weight", "rounding", "unchanged", "error on keys (nearest)", "on text (nearest)"):
        table.add_column(heading, justify="left" if heading == "weight" else "right", overflow="fold")
    for t in merged.tensors:
        errors = ((t.key_error, t.key_error_nearest), (t.text_error, t.text_error_nearest))
        shares = ("-" if a is None or b is None else f"{a:.1e} ({b:.1e})" for a, b in errors)
        table.add_row(t.weight, f"{t.rounding}, {t.dtype}", f"{t.unchanged:.1%}", *shares)
    stdout.print(table)
    if merged.facts:
        before = [(p.history[-1].metrics or {}).get("efficacy", {}).get("exact") for p in merged.parents]
        known = f"; the patch alone: {before[0]:.0%}" if len(before) == 1 and before[0] is not None else ""
        stdout.print(f"facts: {merged.facts.hold} of {merged.facts.asked} hold{known}")
    stdout.print(f"checkpoint: {out}")
