"""`patchkit export`: a patch for other runtimes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchkit.cli.common import (
    base_of,
    note,
    quiet_transformers,
    say,
    stdout,
)
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.export.formats import Exporter
    from patchkit.export.job import Exported

ANY_BASE = "BASE.gguf"
"""What the lines of llama.cpp call the base's file where none was named."""


def _show_formats(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from rich.table import Table

    from patchkit.export.formats import available

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("format", "what it is", "files", "options"):
        table.add_column(heading, overflow="fold")
    for name, form in available().items():
        takes = ", ".join(f"--{option.replace('_', '-')}" for option in ("dtype", *form.takes))
        table.add_row(name, form.summary, ", ".join(form.files), takes)
    stdout.print(table)
    ctx.exit()


@click.command("export")
@click.argument("patch")
@click.option(
    "--format", "kind", default="peft", show_default=True, metavar="NAME", help="Of those that --formats lists."
)
@click.option(
    "--formats", is_flag=True, is_eager=True, expose_value=False, callback=_show_formats, help="List the formats."
)
@click.option("--out", metavar="DIR", help="The folder to write [default: <name of PATCH>-<format>].")
@click.option("--model", metavar="M", help="The base; only its config.json is read [default: as PATCH says].")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Cut every update to rank N; says what that loses.")
@click.option("--all-layers", is_flag=True, help="Zeros for the layers PATCH leaves alone, for servers that want all.")
@click.option("--gguf-base", metavar="FILE", help="The base as GGUF: check the adapter against it, and name it.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@click.option("--swap", metavar="URL", help="Also load it into a running vLLM server, in place of one of its name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    patch: str,
    kind: str,
    out: str | None,
    model: str | None,
    rank: int | None,
    all_layers: bool,
    gguf_base: str | None,
    dtype: str,
    swap: str | None,
    as_json: bool,
) -> None:
    """Write PATCH for another runtime: PEFT, vLLM and TGI, llama.cpp and Ollama, or MLX.

    Exact up to rounding, whatever kind of update the patch holds, unless --rank cuts it.
    """
    from patchkit.export.formats import export, get
    from patchkit.export.job import Options
    from patchkit.patch.patch import Patch

    quiet_transformers()
    _check_swap(swap, kind)
    folder = Path(out) if out else Path(f"{Path(patch).name}-{kind}")
    options = Options(rank, all_layers, gguf_base, dtype)
    loaded = Patch.load(patch)
    done, form = export(loaded, folder, kind, model or base_of(loaded.manifest.base), options=options), get(kind)
    commands = _commands(form, done, folder, model or done.base.name, gguf_base)
    if swap:
        from patchkit.export.swap import swap as load_into

        note(f"{swap} serves it as model {load_into(swap, folder)}")
    if as_json:
        summary = done.model_dump(mode="json", exclude={"parents"})
        stdout.print_json(data={"adapter": str(folder), "commands": commands, **summary})
        return
    for weight in done.weights:
        stdout.print(f"{weight.weight}: rank {weight.rank}, off by {weight.error:.2g} of its change")
    stdout.print(f"{kind}: {folder} (rank {done.rank})")
    for line in commands:
        say(line)


def _commands(form: Exporter, done: Exported, folder: Path, base: str, gguf_base: str | None) -> list[str]:
    """What a user types next; the last line of Python loads the adapter."""
    named = {"title": shlex.quote(str(folder)), "base": shlex.quote(base)}
    lines = [line.format(**named) for line in form.commands(done)]
    if gguf_base:
        lines = [line.partition(f"  # {ANY_BASE}:")[0].replace(ANY_BASE, shlex.quote(gguf_base)) for line in lines]
    return [*lines, *(line.format(title=folder, base=base) for line in form.python.splitlines()[-1:])]


def _check_swap(url: str | None, kind: str) -> None:
    """Raises InputError where there is nothing that a vLLM server could load, before any work."""
    if url is None:
        return
    from patchkit.export.swap import check_server

    check_server(url)
    if kind != "peft":
        raise InputError(f"--swap: vLLM loads no {kind}; leave out --format or --swap")
