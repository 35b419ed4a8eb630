"""`patchkit import`: a LoRA adapter, or the difference of two checkpoints, as a patch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchkit.cli.common import (
    force_option,
    print_json,
    quiet_transformers,
    refuse_place,
    stdout,
)
from patchkit.cli.numbers import Number
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.patch.patch import Patch


@click.command("import")
@click.option("--lora", metavar="DIR", help="A LoRA adapter of PEFT.")
@click.option("--diff", nargs=2, metavar="BASE EDITED", help="Two checkpoints, folders or cached Hub names.")
@click.option("--model", "base", metavar="M", help="The adapter's base [default: as its config says].")
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    metavar="X",
    help="Of --diff: keep this share of each change, squared, at the lowest rank that does [default: all of it].",
)
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Of --diff: keep rank N of each change at most.")
@click.option("--out", required=True, metavar="DIR", help="The patch's folder.")
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(
    lora: str | None,
    diff: tuple[str, str] | None,
    base: str | None,
    energy: float | None,
    rank: int | None,
    out: str,
    force: bool,
    as_json: bool,
) -> None:
    """Make a patch of what others changed: a LoRA adapter, or the difference of an edited checkpoint from its base.

    The patch holds no facts; `verify --facts` measures it on some. It stacks, merges, exports and reverts as a whole.
    """
    from patchkit.cli.tables import patch_table
    from patchkit.patch.stored import read_stored

    quiet_transformers()
    folder = Path(out)
    refuse_place(folder, None, force)
    patch = _imported(lora, diff, base, energy, rank)
    patch.save(folder)
    stored = read_stored(folder)
    if as_json:
        print_json(stored.text)
        return
    stdout.print(patch_table(stored), crop=False)
    stdout.print(f"patch: {folder} (`patchkit verify {folder} --facts F` measures it)", soft_wrap=True)


def _imported(
    lora: str | None, diff: tuple[str, str] | None, base: str | None, energy: float | None, rank: int | None
) -> Patch:
    if (lora is None) == (diff is None):
        raise InputError("import: give either --lora DIR or --diff BASE EDITED")
    if lora is not None:
        if energy is not None or rank is not None:
            raise InputError("--energy and --rank are for --diff; an adapter is imported as it is")
        from patchkit.imports.adapter import import_lora

        return import_lora(lora, base)
    if base is not None:
        raise InputError("--model: --diff names the base already")
    from patchkit.imports.difference import Kept, import_difference

    assert diff is not None
    return import_difference(*diff, Kept(1.0 if energy is None else energy, rank))
