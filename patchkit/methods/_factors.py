"""Singular values, column spaces and dense forms of updates that are kept in their factors."""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Full, Update, delta_of
from patchkit.methods import LayerProblem


class Like:
    """Tensors as they are needed beside another one: in its dtype and on its device, where each is brought once."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._made: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def __call__(self, other: Tensor) -> tuple[Tensor, ...]:
        """All of them, like `other`."""
        key = (other.dtype, other.device)
        if key not in self._made:
            self._made[key] = tuple(tensor.to(other) for tensor in self._tensors)
        return self._made[key]


def singular_triplets(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), σ (r,) descending and V (d_in, r) of U·diag(σ)·V' = left @ right, which is never formed."""
    left, left_core = torch.linalg.qr(delta.left)  # (d_out, r), (r, rank)
    right, right_core = torch.linalg.qr(delta.right.T)  # (d_in, r), (r, rank)
    u, values, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, values, right @ vt.T


def column_space(delta: Delta, tolerance: float = 1e-9) -> Tensor:
    """Orthonormal basis (d_out, r) of the columns of left @ right, σ under `tolerance` of the largest left out."""
    u, values, _ = singular_triplets(delta)
    return u[:, values > tolerance * values.max()] if values.any() else u[:, :0]


def as_delta(update: Update, problem: LayerProblem) -> Delta:
    """An inner method's update as an additive change of the problem's weight."""
    return update if isinstance(update, Delta) else delta_of((update,), lambda: problem.weight)


def as_stored(delta: Delta, inner: Update) -> Update:
    """`delta`, made from `inner`, in its smaller form: its factors, unless `inner` was a full matrix already."""
    return Full(delta.dense()) if isinstance(inner, Full) else delta
