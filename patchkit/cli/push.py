"""`patchkit push`: publish on the Hub."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from patchkit.cli.common import (
    note,
    quiet_transformers,
    say,
    stderr,
    stdout,
)
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.export.package import Package
    from patchkit.export.publish import Pushed


@click.command("push")
@click.argument("folder")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--branch", metavar="B", help="Commit to this branch, made from main where it is not there.")
@click.option("--tag", metavar="T", help="Tag the commit.")
@click.option("--message", metavar="M", help="The commit's message.")
@click.option("--base", metavar="NAME", help="The base's name on the Hub, if the patch was made from a local folder.")
@click.option("--card", metavar="F", help="This file as README.md, instead of the card made from the manifest.")
@click.option(
    "--adapter/--no-adapter",
    default=True,
    help="To a patch, add its adapter for PEFT and vLLM [default: if it can be made].",
)
@click.option(
    "--report/--no-report",
    default=True,
    help="To a patch, add report.html and pictures of what it did [default: yes].",
)
@click.option("--dry-run", is_flag=True, help="Print the files, their sizes and the card; touch no network.")
def command(
    folder: str,
    repo: str,
    private: bool,
    pr: bool,
    branch: str | None,
    tag: str | None,
    message: str | None,
    base: str | None,
    card: str | None,
    adapter: bool,
    report: bool,
    dry_run: bool,
) -> None:
    """Publish FOLDER (a patch, an adapter or a merged model) as the Hub repository REPO (user/name), in one commit.

    The card says what was edited, from which base, how, and how well; the license is the base's. `hf auth login`
    or $HF_TOKEN says who you are.
    """
    from patchkit.export.publish import push

    package = packed(folder, repo, base=base, card=card, online=not dry_run, adapter=adapter, report=report)
    if dry_run:
        for name, size in package.sizes().items():
            say(f"{size:>14,}  {name}")
        say(f"\n{package.card}")
        return
    done = push(package, repo, private=private, pr=pr, branch=branch, tag=tag, message=message, say=note)
    show_pushed(done, usable=package.kind == "patch" and not pr, revision=tag or branch)


def packed(
    folder: str,
    repo: str,
    *,
    base: str | None = None,
    card: str | None = None,
    online: bool = True,
    adapter: bool = True,
    report: bool = True,
) -> Package:
    """What a push would publish; says so where the base's name means nothing to others, and where the adapter or
    the pictures are left out."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from patchkit.export.publish import pack
    from patchkit.patch.card import base_name
    from patchkit.report.kept import evidence

    if not stderr.is_terminal:
        disable_progress_bars()
    quiet_transformers()
    make = partial(pack, folder, repo, base=base, card=card, online=online, look=evidence if report else None)
    try:
        package = make(adapter=adapter)
    except InputError as error:
        package = make()  # raises where it is not about the adapter
        note(f"note: without an adapter for PEFT and vLLM: {error}")
    if package.without_pictures:
        note(f"note: without pictures: {package.without_pictures}")
    named = package.manifests[0].base.name
    if base is None and base_name(named) != named:
        note(f"note: the base is {named} on this machine; `patchkit push --base NAME` tells others its name on the Hub")
    return package


def show_pushed(done: Pushed, *, usable: bool, revision: str | None = None) -> None:
    """Where it went, and for a patch on a branch how others use it."""
    stdout.print(f"pushed: {done.url}", soft_wrap=True)
    if usable:
        name = f"{done.repo}@{revision}" if revision else done.repo
        stdout.print(f'use it: patchkit.Patch.load("{name}"), patchkit verify {name}', soft_wrap=True)
