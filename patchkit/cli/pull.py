"""`patchkit pull`: a patch from the Hub into a folder."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import force_option, own_folder, refuse_place, stdout
from patchkit.errors import InputError
from patchkit.words import counted


@click.command("pull")
@click.argument("repo")
@click.option("--out", metavar="DIR", help="The patch's folder [default: the repository's name].")
@force_option
def command(repo: str, out: str | None, force: bool) -> None:
    """Fetch the patch REPO (user/name or user/name@revision) from the Hub into a folder.

    Commands that only read a patch take REPO itself; a folder is for keeping it, changing it, or having it at hand.
    """
    from patchkit.io.hub import patch_folder
    from patchkit.patch.patch import Patch, copy_patch

    if Path(repo).exists():
        raise InputError(f"{repo}: a folder on this machine; give the name of a Hub repository")
    folder = Path(out) if out else own_folder(repo)
    refuse_place(folder, None, force)
    fetched = patch_folder(repo)
    patch = Patch.load(fetched)
    copy_patch(fetched, folder)
    facts, commit = counted(len(patch.manifest.facts), "fact"), fetched.name
    stdout.print(
        f"patch: {folder} ({facts}, commit {commit[:12]}, digest {patch.manifest.digest[:16]})", soft_wrap=True
    )
    if not patch.state:
        stdout.print("it came without the state that continuing and reverting need; it attaches, merges and exports")
