"""EMMET: a unified framework for model editing. Gupta, Sajnani & Anumanchipalli, 2024."""

from __future__ import annotations

import torch
from pydantic import Field

from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, MethodConfig, method


class EmmetConfig(MethodConfig):
    """Settings of EMMET."""

    damping: float = Field(1e-2, gt=0, description="added to C, in units of C's mean eigenvalue")


@method(
    "emmet",
    config=EmmetConfig,
    paper="https://arxiv.org/abs/2403.14236",
    equations="the closed form for a batch under equality constraints",
    use_when="a batch of facts that are all to be written in full, as rome writes one",
)
def emmet(problem: LayerProblem, config: EmmetConfig) -> Delta:
    """ROME for a batch: the smallest change in C's metric with (W + Δ)K = V.

    Δ = R (K'C⁻¹K)⁻¹ K'C⁻¹, with n = 1 ROME's. C is damped as in ROME. Where keys depend on one another, as with two
    facts of one subject or more facts than d_in, no change meets every value; the pseudo-inverse then takes the one
    that is nearest, where the published code adds a multiple of the identity instead.
    """
    assert problem.covariance is not None
    weighted = problem.covariance.solve(problem.keys, config.damping)  # C⁻¹K (d_in, n)
    gram = problem.keys.T @ weighted  # (n, n)
    return Delta(problem.residual, torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ weighted.T)
