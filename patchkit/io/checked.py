"""safetensors files with a checksum over their notes and tensors: what is read back is what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from patchkit.errors import InputError
from patchkit.io.checkpoint import DTYPES, StoredTensor, read_header, read_metadata
from patchkit.io.files import write_atomically

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Damaged(InputError):
    """A file does not hold what its checksum says."""


def write_checked(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors of real numbers, and text beside them; the file appears whole or not at all.

    Raises OSError where that is not possible.
    """
    ready = {name: _row_major(tensor.detach().cpu()) for name, tensor in tensors.items()}
    parts = (
        (name, _CODES[tensor.dtype], tuple(tensor.shape), [tensor.view(-1).view(torch.uint8).numpy().data])
        for name, tensor in sorted(ready.items())
    )
    header = {**notes, "sha256": _checksum(notes, parts)}
    try:
        write_atomically(file, lambda path: save_file(ready, path, header))
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None


def _row_major(tensor: Tensor) -> Tensor:
    """Itself, or a copy that can be read as bytes: a column of one number is contiguous with any stride."""
    plain = tensor.is_contiguous() and (tensor.ndim == 0 or tensor.stride(-1) == 1)
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)


def read_checked(file: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Notes and tensors of a file, the latter still on disk, once the checksum has been verified.

    Raises:
        Damaged: the file holds something else than what was written.
    """
    try:
        notes, stored = read_metadata(file), read_header(file)
        parts = ((name, each.dtype, each.shape, each.chunks()) for name, each in sorted(stored.items()))
        whole = notes.pop("sha256") == _checksum(notes, parts)
    except (InputError, KeyError, ValueError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{file}: damaged")
    return notes, stored


def _checksum(
    notes: Mapping[str, str], parts: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes | memoryview]]]
) -> str:
    digest = hashlib.sha256(repr(sorted(notes.items())).encode())
    for name, dtype, shape, chunks in parts:
        digest.update(f"{name}|{dtype}|{shape}|".encode())
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()
