"""O-Edit: orthogonal subspace editing for language model sequential editing. Cai & Cao, 2024."""

from __future__ import annotations

from functools import partial
from math import pi
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, Penalty, method
from patchkit.methods._factors import Like, as_delta, column_space
from patchkit.methods.emmet import EmmetConfig, emmet
from patchkit.methods.memit import MemitConfig, memit


class OverConfig(MemitConfig):
    """Settings that O-Edit and O-Edit+ share."""

    over: Literal["memit", "rome"] = Field("memit", description="the method underneath; rome takes batches as EMMET")
    gradient_rate: float = Field(1.0, ge=0, description="λ3: gradient directions spared for each fact edited so far")
    gradient_most: float = Field(0.25, ge=0, le=1, description="most of them, as a share of d_out")


class OEditConfig(OverConfig):
    """Settings of O-Edit."""

    orthogonality: float = Field(0.2, ge=0, description="λ1 and λ2: loss that a random direction adds to a value")


def spared(problem: LayerProblem, config: OverConfig) -> tuple[Tensor, Tensor]:
    """The directions that a new update must leave alone, orthonormal and orthogonal to one another.

    Returns:
        V_ΔW (d_out, r), the column space of all earlier changes, and V_∇G (d_out, q): plain text's leading gradient
        directions with the first taken out (eq. 12), as many as the λ3 of algorithms 1 and 2 gives.
    """
    assert problem.gradient is not None
    earlier = column_space(problem.earlier)
    facts = earlier.shape[1] + problem.keys.shape[1]
    count = min(int(config.gradient_rate * facts), int(config.gradient_most * len(earlier)))
    gradient = problem.gradient[:, :count]
    outside = gradient - earlier @ (earlier.T @ gradient)
    # Eq. 26 stops here; only orthonormal columns give eq. 15's projector, which it stands for.
    basis, sizes, _ = torch.linalg.svd(outside, full_matrices=False)
    return earlier, basis[:, sizes > 1e-9]


def underneath(problem: LayerProblem, config: OverConfig) -> Delta:
    """The update of the method underneath O-Edit."""
    if config.over == "memit":
        return as_delta(memit(problem, config), problem)
    return as_delta(emmet(problem, EmmetConfig(damping=config.damping)), problem)


def penalty(problem: LayerProblem, config: OEditConfig) -> Penalty:
    """λ1·f1 + λ2·f2 of eq. 13, 25 and 27."""
    bases = Like(*(basis for basis in spared(problem, config) if basis.shape[1]))
    # E|cos| of two random directions in d dimensions is √(2/πd) for large d.
    return partial(_cosines, bases, config.orthogonality * (pi * len(problem.residual) / 2) ** 0.5)


def _cosines(bases: Like, weight: float, facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
    total = 0 * delta[:, 0]
    # Far under any real delta's length, it only keeps the gradient finite where the optimizer starts, at 0.
    floor = 1e-3 * start.norm(dim=1, keepdim=True)
    direction = delta / (delta.square().sum(1, keepdim=True) + floor.square()).sqrt()  # (k, d)
    for basis in bases(delta):
        total = total + weight * (direction @ basis).abs().mean(1)
    return total


@method(
    "oedit",
    config=OEditConfig,
    paper="https://arxiv.org/abs/2410.11469",
    equations="eq. 9-14, 25-27",
    use_when="comparing with O-Edit as published; oedit+ keeps facts apart more strictly",
    needs_gradients=True,
    penalty=penalty,
)
def oedit(problem: LayerProblem, config: OEditConfig) -> Delta:
    """MEMIT or ROME with values drawn off the directions of earlier edits and of plain text's gradient.

    The value's loss gets λ1·mean|cos(V_ΔW, v* - Wk)| + λ2·mean|cos(V_∇G, v* - Wk)|. The paper writes cos; singular
    vectors have no sign, so minimizing it would seek the opposite direction instead of an orthogonal one: hence |cos|.
    V_ΔW is all that was changed before, since every earlier change counts (r = its rank). λ1 = λ2 as in the paper, but
    in units of 1/E|cos| of random directions, √(πd/2), which grows with the model: the paper's 50 is 0.6 of them.
    """
    return underneath(problem, config)
