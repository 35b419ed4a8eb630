"""manifest.json: the manifest, a digest of every other file that belongs to the patch, and one digest over all of that.

The digests guard against damage: bits that flipped, files of another patch, a hand that slipped. Whoever changes a
patch on purpose can also write new digests; what guards against that is a signature (`patchkit.patch.signing`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from patchkit.errors import InputError
from patchkit.io.files import finish_folder
from patchkit.patch.manifest import FORMAT_VERSION, Manifest

MANIFEST, SIGNATURE = "manifest.json", "patch.sig"
PROVENANCE = "provenance.json"
COVERED = ("patch.safetensors", "state.safetensors", PROVENANCE)
"""Files that the manifest has the digest of."""
_MOST = 1 << 30
"""Bytes of a manifest that are read."""


@dataclass(frozen=True)
class Stored:
    """What manifest.json holds.

    Attributes:
        files: sha256 by file of `COVERED`, as it was when the patch was written; empty in format 1.
        digest: sha256 over everything else in manifest.json, the digests of the files included; None in format 1.
    """

    manifest: Manifest
    files: Mapping[str, str]
    digest: str | None

    @property
    def text(self) -> str:
        """The text of manifest.json."""
        if self.digest is None:
            return self.manifest.model_dump_json(indent=1) + "\n"
        return manifest_text(self.manifest, self.files)

    def check(self, folder: Path, name: str) -> None:
        """Raises InputError where a file of the folder is not there, or not the one that was written."""
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name} is missing, or no plain file; get the patch again")
        if self.digest is not None and self.files.get(name) != file_digest(folder / name):
            raise InputError(f"{folder}: {name} is not the one in {MANIFEST}; get the patch again")


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digests_of(folder: Path) -> dict[str, str]:
    """By name the digest of each file in `COVERED` that is there."""
    return {name: file_digest(folder / name) for name in COVERED if (folder / name).is_file()}


def manifest_text(manifest: Manifest, files: Mapping[str, str]) -> str:
    """manifest.json, with the digests of the files beside it."""
    fields = {**json.loads(manifest.model_dump_json()), "format_version": FORMAT_VERSION, "files": dict(files)}
    return with_digest(fields)


def with_digest(fields: Mapping[str, Any]) -> str:
    """The text of manifest.json with these fields, and the digest over all of them."""
    digest = _digest(json.dumps(fields))
    return json.dumps({**fields, "sha256": digest}, indent=1, ensure_ascii=False) + "\n"


def _digest(text: str) -> str:
    """sha256 over JSON: every name, every value and every digit of a number, whatever the spaces and the order."""
    fields = json.loads(text, parse_int=_number, parse_float=_number, object_pairs_hook=_object)
    fields.pop("sha256", None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _number(digits: str) -> str:
    return f"\0{digits}"


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a name twice in one object")
    return fields


def read_stored(folder: Path) -> Stored:
    """manifest.json of a patch's folder, in which a write that was cut off is finished first.

    Raises:
        InputError: there is none, it is damaged, contradicts itself, or is of a newer format.
    """
    finish_folder(folder)
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder}: not a patch, there is no {MANIFEST} in it")
    if file.stat().st_size > _MOST:
        raise InputError(f"{file}: larger than any manifest; damaged, or no manifest at all")
    return parsed(file.read_bytes(), str(file))


def parsed(data: bytes, file: str) -> Stored:
    """What a manifest.json of these bytes holds; `file` is its name in messages.

    Raises:
        InputError: as `read_stored`.
    """
    try:
        text = data.decode("utf-8")
        fields = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not JSON that can be read; damaged, get the patch again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file}: not a patch's manifest; get the patch again")
    version = fields.get("format_version", 1)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(f"{file}: format {version} is newer than this patchkit's; upgrade patchkit")
    digest = None if version == 1 else _checked(fields, text, file)
    files = {} if digest is None else fields.pop("files")
    try:
        return Stored(Manifest.model_validate_json(json.dumps(fields)), files, digest)
    except ValidationError as error:
        raise InputError(f"{file}: {_told(error)}; damaged, or made by another version") from None


def _checked(fields: dict[str, Any], text: str, file: str) -> str:
    """Take the digest out of the fields, once it is known to be right."""
    digest, files = fields.pop("sha256", None), fields.get("files")
    try:
        right = digest == _digest(text) and isinstance(files, dict)
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise InputError(f"{file}: not what its digest says; it was damaged or changed by hand, get the patch again")
    return str(digest)


def _told(error: ValidationError) -> str:
    problem = error.errors()[0]
    where, what = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def warn_without_digests(folder: Path) -> None:
    """A patch of format 1 opens, and nobody can tell whether it is whole."""
    warnings.warn(
        f"{folder}: format 1, without digests of its state and its manifest, so that damage there is not noticed; "
        "patchkit writes it in format 2 when it is next changed",
        stacklevel=3,
    )
