"""Updates of weights side by side, W = [W_1 ... W_E] (d_out, E·width), as updates of each, and their sum put together.

A method solves for one matrix; what experts store, run and merge are their own. An update of one is an update of the
matrix in one block of columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Full, Sparse, Update


@dataclass(frozen=True)
class InBlock:
    """An update of one of the weights."""

    block: int
    update: Update


RANK_TOLERANCE = 1e-9
"""Singular values under this share of the largest are rounding errors of float64."""


def split(update: Update, blocks: int) -> Iterator[tuple[int, Update]]:
    """By block, in which of them it does anything, the update of that block's weight.

    Raises:
        ValueError: a rotation of the keys that turns some of one block into another.
    """
    if isinstance(update, Rotation):
        yield from ((block, update) for block in range(blocks)) if update.side == "left" else _turns(update, blocks)
        return
    delta = update.delta() if isinstance(update, Sparse) else None
    whole = update.matrix if isinstance(update, Full) else (delta or update).right
    for block, part in enumerate(whole.unflatten(1, (blocks, -1)).unbind(1)):
        if not part.any():
            continue
        if isinstance(update, Full):
            yield block, Full(part.contiguous())
        elif delta is not None:
            yield block, Sparse.of(delta.left, part.T)
        else:
            yield block, Delta(update.left, part.contiguous())


def _turns(update: Rotation, blocks: int) -> Iterator[tuple[int, Update]]:
    planes = update.planes.unflatten(0, (blocks, -1))  # (blocks, width, 2p)
    inside = planes.any(1)[:, 0::2] | planes.any(1)[:, 1::2]  # (blocks, p)
    if inside.sum(0).max() > 1:
        raise ValueError("a rotation that turns one weight's keys into another's")
    for block in inside.any(1).nonzero().squeeze(1).tolist():
        at = inside[block].nonzero().squeeze(1)
        columns = torch.stack([2 * at, 2 * at + 1], 1).flatten()
        yield block, Rotation("right", planes[block][:, columns].contiguous(), update.angles[at])


def turned(parts: Mapping[int, Rotation], blocks: int, width: int) -> Rotation:
    """Rotations of the keys of some blocks as one of all, which leaves each in its block."""
    like = next(iter(parts.values()))
    planes = like.planes.new_zeros(blocks, width, sum(part.rank for part in parts.values()))
    first = 0
    for block, part in parts.items():
        planes[block, :, first : first + part.rank] = part.planes
        first += part.rank
    return Rotation("right", planes.flatten(0, 1), torch.cat([part.angles for part in parts.values()]))


def joined(parts: Mapping[int, Delta], blocks: int) -> Delta:
    """The changes of some blocks as one of the whole matrix, (d_out, blocks·width).

    What solves have left shares its left factor, which is kept once; else the factors lie one beside the other, unless
    the matrix itself is smaller than that.
    """
    deltas = list(parts.values())
    left, width = deltas[0].left, deltas[0].right.shape[1]
    alike = all(each.left is left or torch.equal(each.left, left) for each in deltas[1:])
    rank = left.shape[1] if alike else sum(each.rank for each in deltas)
    d_out = len(left)
    if not alike and rank * (d_out + blocks * width) >= d_out * blocks * width:
        dense = left.new_zeros(d_out, blocks, width)
        for block, each in parts.items():
            dense[:, block] = each.dense()
        return Delta(torch.eye(d_out, dtype=left.dtype, device=left.device), dense.flatten(1))
    right, first = left.new_zeros(rank, blocks, width), 0
    for block, each in parts.items():
        right[first : first + each.rank, block] = each.right
        first += 0 if alike else each.rank
    return Delta(left if alike else torch.cat([each.left for each in deltas], 1), right.flatten(1))


def compact(delta: Delta) -> Delta:
    """The same change in as few columns as its rank, if those are fewer by a quarter at least.

    Of the facts that a batch is solved for few are routed to any one expert, but all are in its left factor.
    """
    if not delta.rank:
        return delta
    (left, inner), (right, outer) = torch.linalg.qr(delta.left.double()), torch.linalg.qr(delta.right.double().T)
    u, values, vt = torch.linalg.svd(inner @ outer.T)
    kept = int((values > RANK_TOLERANCE * values[0]).sum())
    if kept > 0.75 * delta.rank:
        return delta
    root = values[:kept].sqrt()
    made = Delta(left @ (u[:, :kept] * root), (right @ (vt[:kept].T * root)).T)
    return made.to(delta.left.dtype)


def in_blocks(columns: Tensor, blocks: int) -> Sequence[int]:
    """Which blocks of rows of a matrix (blocks·width, n) have anything in them."""
    found: list[int] = columns.unflatten(0, (blocks, -1)).flatten(1).any(1).nonzero().squeeze(1).tolist()
    return found
