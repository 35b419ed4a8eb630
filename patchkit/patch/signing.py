"""Signatures of patches, as OpenSSF model signing makes them: who says that this is the patch.

patch.sig is a sigstore bundle over the files of `SIGNED` that the folder has. What else lies there, the card included,
is not signed. Specification: https://github.com/ossf/model-signing-spec
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from patchkit.errors import InputError, PatchkitError
from patchkit.io.files import write_atomically
from patchkit.patch.patch import Patch
from patchkit.patch.stored import COVERED, MANIFEST, SIGNATURE

SIGNED = (MANIFEST, *COVERED)


@dataclass(frozen=True)
class Signer:
    """Who signs: a private key (PEM, of an elliptic curve) with its password; without one, whom OIDC says you are.

    token: an OIDC token, where no browser can be opened. issuer: of the token, in place of sigstore's own.
    """

    key: str | None = None
    password: str | None = None
    token: str | None = None
    issuer: str | None = None


@dataclass(frozen=True)
class Expected:
    """Who should have signed: whoever has the private key of this public one (PEM), or this identity (an e-mail address
    or the address of a workflow), of which this issuer is sure."""

    key: str | None = None
    identity: str | None = None
    issuer: str | None = None


def sign(folder: Path, signer: Signer) -> Path:
    """Sign the patch in `folder`, which is checked first; an earlier signature is replaced.

    Returns:
        The file of the signature.

    Raises:
        InputError: no patch, a key that cannot be used, or the package model-signing is missing.
        PatchkitError: signing failed; with OIDC that may be the network.
    """
    Patch.load(folder)
    config = _library("signing").Config()
    if signer.key is not None:
        _check_key(signer.key)
    with _alone(folder) as alone:
        made = alone.parent / SIGNATURE
        try:
            if signer.key is not None:
                config.use_elliptic_key_signer(private_key=Path(signer.key), password=signer.password)
            else:  # a token that is given, else that of the machine's own workflow, else one by the browser
                own = {"identity_token": signer.token, "oidc_issuer": signer.issuer}
                config.use_sigstore_signer(use_ambient_credentials=True, **own)
            config.sign(alone, made)
        except Exception as error:  # whatever the library, its cryptography and the network raise
            raise PatchkitError(f"{folder}: not signed: {_line(error)}") from None
        write_atomically(folder / SIGNATURE, lambda file: _copy(made, file))
    return folder / SIGNATURE


def check_signature(folder: Path, expected: Expected) -> None:
    """Check the signature of the patch in `folder`, then the patch against its digests.

    Raises:
        InputError: there is no signature, nobody is expected, or a key cannot be used.
        PatchkitError: the signature is not that of whom is expected, or not of these files.
    """
    file = folder / SIGNATURE
    if not file.is_file():
        raise InputError(f"{folder}: not signed, there is no {SIGNATURE} in it")
    config = _library("verifying").Config()
    if expected.key is not None:
        _check_key(expected.key)
    elif not (expected.identity and expected.issuer):
        raise InputError("--signature: say who should have signed: --public-key FILE, or --identity and --issuer")
    with _alone(folder) as alone:
        try:
            if expected.key is not None:
                config.use_elliptic_key_verifier(public_key=Path(expected.key))
            else:
                config.use_sigstore_verifier(identity=expected.identity, oidc_issuer=expected.issuer)
            config.verify(alone, file)
        except Exception as error:  # as above
            raise PatchkitError(f"{folder}: its signature does not hold: {_line(error)}; do not use it") from None
    Patch.load(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A copy of the signed files in a folder of the same name: the library takes no links, which the Hub's cache is
    made of, and signs whatever else lies there."""
    with TemporaryDirectory() as place:
        alone = Path(place) / folder.absolute().name
        alone.mkdir()
        for name in SIGNED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, alone / name)
        yield alone


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _library(part: str) -> Any:
    if importlib.util.find_spec("model_signing") is None:
        raise InputError('signatures need the package model-signing; pip install "patchkit-lm[sign]"')
    return importlib.import_module(f"model_signing.{part}")


def _check_key(name: str) -> None:
    if not Path(name).is_file():
        raise InputError(f"{name}: no such file; give a key in PEM's form")


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
