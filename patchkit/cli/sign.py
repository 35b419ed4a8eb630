"""`patchkit sign`: say that a patch is yours."""

from __future__ import annotations

from pathlib import Path

import click

from patchkit.cli.common import stdout


@click.command("sign")
@click.argument("patch", metavar="PATCH")
@click.option(
    "--key", metavar="F", help="Private key of an elliptic curve, as PEM [default: sign by OIDC, as sigstore]."
)
@click.option(
    "--password", envvar="PATCHKIT_KEY_PASSWORD", metavar="TEXT", help="Of the key; better in $PATCHKIT_KEY_PASSWORD."
)
@click.option("--token", envvar="PATCHKIT_OIDC_TOKEN", metavar="TEXT", help="OIDC token, where there is no browser.")
@click.option("--issuer", metavar="URL", help="Who gives such tokens, if not sigstore.")
def command(patch: str, key: str | None, password: str | None, token: str | None, issuer: str | None) -> None:
    """Sign the folder PATCH: its weights, state, manifest and provenance, in the form of OpenSSF model signing.

    Digests, which every patch has, guard against damage. A signature guards against somebody who changes a patch and
    its digests: `patchkit verify --signature` says whether it is yours. Changing a patch removes its signature.
    """
    from patchkit.patch.signing import Signer, sign

    file = sign(Path(patch), Signer(key, password, token, issuer))
    how = f"--public-key {Path(key).with_suffix('.pub.pem').name}" if key else "--identity YOU --issuer URL"
    stdout.print(f"signed: {file}; `patchkit verify {patch} --signature {how}` checks it", soft_wrap=True)
