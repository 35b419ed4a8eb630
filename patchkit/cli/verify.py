"""`patchkit verify`: measure a patch, and fail when it is not good enough."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import (
    GatedCommand,
    ModelOptions,
    model_options,
    note,
    print_json,
    progress_bars,
    quick_option,
    refuse_quick,
    stdout,
    zsre_option,
)
from patchkit.evaluate.gates import Gates


@click.command("verify", cls=GatedCommand)
@click.argument("patch")
@model_options
@click.option("--facts", metavar="F", help="Measure these facts [default: those in the patch].")
@click.option(
    "--text", type=click.Path(), help="Plain text for the perplexity [default: a small one that comes along]."
)
@zsre_option
@click.option("--skip-bad", is_flag=True, help="Leave out facts of --facts that cannot be used.")
@quick_option
@click.option("--signature", is_flag=True, help="First check the patch's signature; say whose it should be.")
@click.option("--public-key", metavar="F", help="For --signature: the public key, as PEM.")
@click.option("--identity", metavar="WHO", help="For --signature: the e-mail address or workflow that signed by OIDC.")
@click.option("--issuer", metavar="URL", help="For --signature: who is sure of that identity.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    patch: str,
    model: ModelOptions,
    facts: str | None,
    text: str | None,
    zsre_target: str,
    skip_bad: bool,
    quick: bool,
    signature: bool,
    public_key: str | None,
    identity: str | None,
    issuer: str | None,
    as_json: bool,
    gates: Gates,
) -> None:
    """Measure PATCH against the untouched base model; exit with 1 when a gate does not hold.

    Without --model: the base the patch names.
    """
    from patchkit.cli.jobs import verify_patch
    from patchkit.cli.tables import apply_table
    from patchkit.io.hub import patch_folder

    refuse_quick(quick, gates)
    if signature or public_key or identity or issuer:
        from patchkit.patch.signing import Expected, check_signature

        check_signature(patch_folder(patch), Expected(public_key, identity, issuer))
        note(f"{patch}: its signature holds")
    with progress_bars() as progress:
        report = verify_patch(
            Path(patch),
            model.choice,
            facts=facts,
            text=text,
            zsre_target=zsre_target,
            skip_bad=skip_bad,
            quick=quick,
            progress=progress,
            say=note,
        )
    if as_json:
        print_json(report.model_dump_json())
    else:
        stdout.print(apply_table(report))
    gates.check(report)
