"""The changes of patches by the tensors of a checkpoint that they change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.checkpoint import (
    DTYPES,
    StoredTensor,
)
from patchkit.maths.linalg import Delta
from patchkit.model.digests import tensor_digest
from patchkit.model.expert_names import ExpertPlace, find_expert, member_of, slice_name, split_name
from patchkit.model.weights import find_module, find_weight, is_transposed, skeleton
from patchkit.patch.patch import Patch
from patchkit.patch.unfolded import folding_at_full_precision, unfolded

_OTHER_MODEL = "the patch was made for another model"
_FULL_PRECISION = (
    "merge into the full-precision checkpoint (--model) and quantize that, or attach the patch (patchkit.load, "
    "patchkit serve)"
)


@dataclass(frozen=True)
class Edit:
    """The sum of all patches' changes to one tensor, with the keys of their facts (d_in, n), n possibly 0.

    transposed: whether the tensor lies as (d_in, d_out). of_expert: whether it is an expert's, of which statistics are
    kept with those of all of its layer. digests: per patch the tensor's name in it, and the digest of
    the numbers it was made for.
    """

    weight: str
    stored: StoredTensor
    transposed: bool
    delta: Delta
    keys: Tensor
    digests: frozenset[tuple[str, str]]
    of_expert: bool = False

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
        digests = self.digests | other.digests
        return Edit(self.weight, self.stored, self.transposed, delta, keys, digests, self.of_expert)


def collect_edits(patches: Sequence[Patch], checkpoint: Mapping[str, StoredTensor], source: Path) -> list[Edit]:
    """One edit per tensor: deltas add up in the order of the patches."""
    edits: dict[str, Edit] = {}
    tree = cached_skeleton(source)
    for patch in patches:
        shapes = {info.weight: info.shape for info in patch.manifest.updates}
        for weight, chain in patch.updates.items():
            name, stored = _find(weight, checkpoint, source)
            place = _place(patch, weight, shapes[weight], tree)
            lies = _lies_transposed(name, stored, shapes[weight], tree, place)
            there = partial(_oriented, stored, lies)
            scales = folding_at_full_precision(patch, weight, there)
            delta = unfolded(chain, scales, there)
            named = (place.stack, place.expert) if place else None
            member = member_of(weight, patch.manifest.base.stacks) or named
            keys = _keys(patch, weight, member)
            keys = delta.right.new_zeros(delta.right.shape[1], 0) if keys is None else scales.keys(keys)
            digests = frozenset[tuple[str, str]]()
            if patch.manifest.base.quantized is None:  # else they are those of what its packed weights multiply with
                digests = frozenset({(weight, patch.manifest.base.weights[weight])})
            edit = Edit(name, stored, lies, delta, keys, digests, member is not None)
            edits[name] = edits[name].plus(edit) if name in edits else edit
    return list(edits.values())


def cached_skeleton(source: Path) -> Callable[[], PreTrainedModel]:
    """Gives the model of a checkpoint without its numbers, made once if it is asked for."""
    return cache(partial(skeleton, source))


def _may_be_expert(weight: str) -> bool:
    return split_name(weight)[1] is not None or ".experts." in weight


def _place(
    patch: Patch, weight: str, shape: tuple[int, int], tree: Callable[[], PreTrainedModel]
) -> ExpertPlace | None:
    """Where an expert's weight is in the tree, which is asked only where nothing else tells what the weight is, or how
    it lies: code that comes with a model is not run to make one."""
    if f"{weight}.keys" in patch.state or not _may_be_expert(weight):
        return None
    told = split_name(weight)[1] is None and shape[0] != shape[1] and member_of(weight, patch.manifest.base.stacks)
    return None if told else find_expert(tree(), weight, shape)


def _keys(patch: Patch, weight: str, member: tuple[str, int] | None) -> Tensor | None:
    """The keys (d_in, n) of the weight's solves, those of an expert being a part of its layer's; None without any."""
    if member is None:
        return patch.state.get(f"{weight}.keys")
    stack, expert = member
    every = patch.state.get(f"{stack}.keys")
    if every is None:
        return None
    own: Tensor = every.unflatten(0, (patch.manifest.base.stacks[stack], -1))[expert]
    return own[:, own.any(0)]


def _find(weight: str, checkpoint: Mapping[str, StoredTensor], source: Path) -> tuple[str, StoredTensor]:
    """The tensor's name in the checkpoint, and the tensor, or the part of a stack that it is.

    Raises:
        InputError: it is not there, or quantized: a delta is never left out, nor added to packed numbers.
    """
    method = quantized_with(source)
    advice = _OTHER_MODEL if method is None else f"the checkpoint is quantized ({method}); {_FULL_PRECISION}"
    whole, number = split_name(weight)
    name = find_weight(whole, checkpoint, str(source), advice)
    if checkpoint[name].dtype not in DTYPES:
        raise InputError(
            f"{checkpoint[name].file}: {name} is stored as {checkpoint[name].dtype}"
            f"{f', quantized with {method}' if method else ''}; {_FULL_PRECISION}"
        )
    if number is None:
        return name, checkpoint[name]
    if len(checkpoint[name].shape) != 3 or number >= checkpoint[name].shape[0]:
        raise InputError(f"{checkpoint[name].file}: {name} has no part {number}: {_OTHER_MODEL}")
    return slice_name(name, number), checkpoint[name].slice(number)


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


def _lies_transposed(
    name: str,
    stored: StoredTensor,
    shape: tuple[int, int],
    tree: Callable[[], PreTrainedModel],
    place: ExpertPlace | None,
) -> bool:
    """Whether the tensor lies as (d_in, d_out). Its shape tells, unless it is square; then its module's class does."""
    if stored.shape not in (shape, shape[::-1]):
        raise InputError(f"{stored.file}: {name} is {stored.shape}, the patch is for {shape}: it is another model's")
    if shape[0] != shape[1]:
        return stored.shape != shape
    if place is not None:
        return place.transposed
    _, module = find_module(tree(), name, _OTHER_MODEL)
    return is_transposed(module)


def check_base(edit: Edit, tensor: Tensor) -> None:
    if any(tensor_digest(weight, tensor) != digest for weight, digest in edit.digests):
        raise InputError(
            f"{edit.stored.file}: {edit.weight} holds other numbers than in the model the patch was made for; "
            "merge into that one, or use --force if you know that the two are close"
        )
