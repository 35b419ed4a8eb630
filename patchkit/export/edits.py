"""The changes of patches by the tensors of a checkpoint that they change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.io.checkpoint import (
    DTYPES,
    StoredTensor,
)
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import delta_of
from patchkit.model.weights import find_module, find_weight, is_transposed, skeleton, tensor_digest
from patchkit.patch.patch import Patch

_OTHER_MODEL = "the patch was made for another model"
_FULL_PRECISION = (
    "merge into the full-precision checkpoint and quantize that, or attach the patch (patchkit.load, patchkit serve)"
)


@dataclass(frozen=True)
class Edit:
    """The sum of all patches' changes to one tensor, with the keys of their facts (d_in, n), n possibly 0.

    transposed: whether the tensor lies as (d_in, d_out). digests: per patch the tensor's name in it, and the digest of
    the numbers it was made for.
    """

    weight: str
    stored: StoredTensor
    transposed: bool
    delta: Delta
    keys: Tensor
    digests: frozenset[tuple[str, str]]

    @property
    def d_out(self) -> int:
        return self.delta.left.shape[0]

    @property
    def d_in(self) -> int:
        return self.delta.right.shape[1]

    @property
    def work(self) -> torch.dtype:
        """What the new numbers are computed in."""
        return torch.float32 if self.stored.dtype in ("BF16", "F16") else torch.float64

    def plus(self, other: Edit) -> Edit:
        """Both changes, one after the other."""
        if (self.d_out, self.d_in) != (other.d_out, other.d_in):
            raise InputError(f"{self.weight}: the patches are for weights of different shapes; merge one of them")
        delta, keys = Delta.stack([self.delta, other.delta]), torch.cat([self.keys, other.keys], 1)
        return Edit(self.weight, self.stored, self.transposed, delta, keys, self.digests | other.digests)


def collect_edits(patches: Sequence[Patch], checkpoint: Mapping[str, StoredTensor], source: Path) -> list[Edit]:
    """One edit per tensor: deltas add up in the order of the patches."""
    edits: dict[str, Edit] = {}
    for patch in patches:
        shapes = {info.weight: info.shape for info in patch.manifest.updates}
        for weight, chain in patch.updates.items():
            name = _find(weight, checkpoint, source)
            stored = checkpoint[name]
            lies = _lies_transposed(name, stored, shapes[weight], source)
            delta = delta_of(chain, partial(_oriented, stored, lies))
            keys = patch.state.get(f"{weight}.keys", delta.right.new_zeros(delta.right.shape[1], 0))
            digests = frozenset({(weight, patch.manifest.base.weights[weight])})
            edit = Edit(name, stored, lies, delta, keys, digests)
            edits[name] = edits[name].plus(edit) if name in edits else edit
    return list(edits.values())


def _find(weight: str, checkpoint: Mapping[str, StoredTensor], source: Path) -> str:
    """The tensor's name in the checkpoint.

    Raises:
        InputError: it is not there, or quantized: a delta is never left out, nor added to packed numbers.
    """
    method = quantized_with(source)
    advice = _OTHER_MODEL if method is None else f"the checkpoint is quantized ({method}); {_FULL_PRECISION}"
    name = find_weight(weight, checkpoint, str(source), advice)
    if checkpoint[name].dtype not in DTYPES:
        raise InputError(
            f"{checkpoint[name].file}: {name} is stored as {checkpoint[name].dtype}"
            f"{f', quantized with {method}' if method else ''}; {_FULL_PRECISION}"
        )
    return name


def quantized_with(source: Path) -> str | None:
    """The method that a checkpoint says it is quantized with."""
    file = source / "config.json"
    try:
        config = json.loads(file.read_bytes() if file.is_file() else b"{}").get("quantization_config") or {}
        method = config.get("quant_method")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return str(method) if method else None


def _oriented(stored: StoredTensor, transposed: bool) -> Tensor:
    return stored.read().T if transposed else stored.read()


def _lies_transposed(name: str, stored: StoredTensor, shape: tuple[int, int], source: Path) -> bool:
    """Whether the tensor lies as (d_in, d_out). Its shape tells, unless it is square; then its module's class does."""
    if stored.shape not in (shape, shape[::-1]):
        raise InputError(f"{stored.file}: {name} is {stored.shape}, the patch is for {shape}: it is another model's")
    if shape[0] != shape[1]:
        return stored.shape != shape
    _, module = find_module(skeleton(source), name, _OTHER_MODEL)
    return is_transposed(module)


def check_base(edit: Edit, tensor: Tensor) -> None:
    if any(tensor_digest(weight, tensor) != digest for weight, digest in edit.digests):
        raise InputError(
            f"{edit.stored.file}: {edit.weight} holds other numbers than in the model the patch was made for; "
            "merge into that one, or use --force if you know that the two are close"
        )
