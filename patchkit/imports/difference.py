"""The difference of two checkpoints as a patch: streamed, one tensor of each in memory at a time.

Each weight's change D = W₁ - W₀ is kept in the smallest form that is exact up to float32's rounding: sparse where few
rows or columns change, low-rank where few singular values are left, else whole. With an energy or a rank it is the best
low-rank approximation instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.imports.assemble import Base, imported
from patchkit.io.checkpoint import DTYPES
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain, Full, Sparse
from patchkit.model.digests import tensor_digest
from patchkit.model.weights import oriented
from patchkit.patch.bases import public_argument
from patchkit.patch.manifest import Source
from patchkit.patch.patch import Patch

EXACT = 1e-6
"""‖kept - D‖/‖W₁‖ that counts as exact: float32's rounding of a merged weight."""
_FIRST_RANK = 16


@dataclass(frozen=True)
class Kept:
    """How much of a difference to keep: `energy`, a share of ‖D‖², or `rank` at most; by default all of it."""

    energy: float = 1.0
    rank: int | None = None


@dataclass
class _Found:
    """What was found so far: chains and digests of edited tensors by name, and the largest relative error."""

    chains: dict[str, Chain] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    error: float = 0.0


def import_difference(base: str, edited: str, kept: Kept | None = None) -> Patch:
    """What turns `base` into `edited`, two folders or cached Hub names of one architecture, as a patch for `base`.

    Raises:
        InputError: they do not hold the same tensors, or one changed that is no linear layer's weight.
    """
    of, after, wanted, found = Base(base), Base(edited), kept or Kept(), _Found()
    for name, before_tensor, after_tensor in _changed(of, after):
        module = of.module(name)
        if module is None:
            raise InputError(
                f"{name}: differs, and is no linear layer's weight: no patch changes it; use {edited} itself"
            )
        change = oriented(module, after_tensor.double() - before_tensor.double())  # (d_out, d_in)
        chain = _chain(change, wanted, float(after_tensor.double().norm()))
        found.error = max(found.error, _error(chain, change))
        found.chains[name], found.digests[name] = chain, tensor_digest(name, after_tensor)
    settings = {"energy": wanted.energy, "rank": wanted.rank}
    name = public_argument(edited)
    source = Source(kind="difference", name=name, digests=found.digests, settings=settings, error=found.error)
    return imported(of, found.chains, source)


def _changed(before: Base, after: Base) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and both tensors, as they are stored, of each that differs."""
    if odd := sorted(before.stored.keys() ^ after.stored.keys()):
        where = before.folder if odd[0] in before.stored else after.folder
        raise InputError(f"{odd[0]}: only in {where}; the two checkpoints are of different models")
    for name, one in before.stored.items():
        other = after.stored[name]
        if one.shape != other.shape:
            raise InputError(f"{name}: {one.shape} in {before.folder}, {other.shape} in {after.folder}; not one model")
        if one.dtype == other.dtype and all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True)):
            continue
        if not {one.dtype, other.dtype} <= DTYPES.keys():
            raise InputError(f"{name}: stored as {one.dtype} and {other.dtype}; compare checkpoints not quantized")
        first, second = one.read(), other.read()
        narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(first.to(narrow), second.to(narrow)):  # another dtype is no change
            yield name, first, second


def _chain(change: Tensor, kept: Kept, size: float) -> Chain:
    """The update that is kept of a change (d_out, d_in) of a weight whose norm is `size` after it."""
    if kept.energy >= 1 and kept.rank is None:
        if sparse := _sparse(change):
            return (sparse,)
        tolerance = EXACT * size
    else:
        tolerance = float(change.norm()) * max(0.0, 1 - kept.energy) ** 0.5
    delta = low_rank_within(change, tolerance, kept.rank)
    return (delta,) if delta else (Full(change.float()),)


def _sparse(change: Tensor) -> Sparse | None:
    """The change row by row or column by column, if few of them change: then a bitmap of each is the smallest form."""
    rows, columns = change.abs().sum(1).nonzero()[:, 0], change.abs().sum(0).nonzero()[:, 0]
    few_rows = len(rows) * change.shape[1] <= len(columns) * change.shape[0]
    places = rows if few_rows else columns
    if (change != 0).sum() > change.numel() // 16 or len(places) > max(change.shape) // 8:
        return None
    left = torch.zeros(change.shape[0], len(places), dtype=change.dtype)
    right = torch.zeros(change.shape[1], len(places), dtype=change.dtype)
    each = torch.arange(len(places))
    if few_rows:
        left[rows, each], right = 1.0, change[rows].T
    else:
        left, right[columns, each] = change[:, columns], 1.0
    return Sparse.of(left.float(), right.float())


def low_rank_within(change: Tensor, tolerance: float, rank: int | None = None) -> Delta | None:
    """The lowest-rank delta within `tolerance` (Frobenius) of a change (d_out, d_in), of at most `rank`.

    By a randomized range finder (Halko et al., 2011) whose rank doubles until it is met; None where no low rank smaller
    than the change itself does.
    """
    d_out, d_in = change.shape
    most = min(rank or d_out, d_out, d_in)
    size, cheap = _FIRST_RANK if rank is None else most, d_out * d_in // (d_out + d_in)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while True:
            size = min(size, most)
            u, values, v = torch.svd_lowrank(change, q=min(size + 8, d_out, d_in), niter=4)
            left = _rest(change, u, values, v)  # ‖change - its first k components‖, for k = 0, 1, ...
            enough = next((k for k, rest in enumerate(left) if rest <= tolerance), len(left))
            if enough <= size or size == most:
                count = min(enough, size)
                root = values[:count].sqrt()
                small = count <= cheap or rank is not None
                return Delta((u[:, :count] * root).float(), (v[:, :count] * root).T.float()) if small else None
            if size >= cheap:
                return None
            size *= 2


def _rest(change: Tensor, u: Tensor, values: Tensor, v: Tensor) -> list[float]:
    """Norms of what is left of the change without its first k singular components, for every k."""
    beyond = (change - (u * values) @ v.T).square().sum()
    tails = values.square().flip(0).cumsum(0).flip(0)
    return [float((beyond + tail).sqrt()) for tail in (*tails, values.new_zeros(()))]


def _error(chain: Chain, change: Tensor) -> float:
    (update,) = chain
    kept = update if isinstance(update, Delta) else update.delta()  # type: ignore[call-arg]
    return float((kept.to(torch.float64).dense() - change).norm() / change.norm())
