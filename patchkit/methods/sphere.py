"""SPHERE: energy-regularized sequential model editing on hyperspheres. Liu et al., 2025."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, MethodConfig, wrapper
from patchkit.methods._factors import as_delta, as_stored


class SphereConfig(MethodConfig):
    """Settings of SPHERE."""

    energy: float = Field(0.5, gt=0, lt=1, description="share of the neurons' energy in the principal directions")
    strength: float = Field(0.5, gt=0, le=1, description="α: how much of the change along them is taken away")


@wrapper(
    "sphere",
    config=SphereConfig,
    paper="https://arxiv.org/abs/2510.01172",
    equations="the projection I - αUU'",
    use_when="long sequences: the directions of a weight's rows stay spread as training left them",
)
def sphere(problem: LayerProblem, config: SphereConfig, solve: Callable[[LayerProblem], Update]) -> Update:
    """Removes from the update the part along the principal directions of the base's neurons.

    Δ(I - αUU'), U (d_in, r) the leading eigenvectors of Ŵ'Ŵ, Ŵ the rows of W scaled to length 1, up to the one with
    which they hold `energy` of the trace. W is the base's, as the paper's text says; its code takes the weight as
    edited so far.
    """
    inner = solve(problem)
    new = as_delta(inner, problem)
    directions = problem.once(principal_directions, config.energy)
    right = new.right - config.strength * (new.right @ directions) @ directions.T  # (r, d_in)
    return as_stored(Delta(new.left, right), inner)


def principal_directions(weight: Tensor, energy: float) -> Tensor:
    """U (d_in, r): leading right singular vectors of the row-normalized W, from the smaller Gram matrix."""
    rows = weight / weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)  # (d_out, d_in)
    wide = weight.shape[0] <= weight.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = int((values.cumsum(0) <= energy * values.sum()).sum()) + 1
    chosen: Tensor = vectors[:, :count]
    return (rows.T @ chosen) / values[:count].sqrt() if wide else chosen  # (d_in, r)
