"""ROME: rank-one model editing. Meng et al., "Locating and Editing Factual Associations in GPT", 2022."""

from __future__ import annotations

from pydantic import Field

from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, MethodConfig, method


class RomeConfig(MethodConfig):
    """Settings of ROME."""

    damping: float = Field(1e-2, gt=0, description="added to C, in units of C's mean eigenvalue")


@method(
    "rome",
    config=RomeConfig,
    paper="https://arxiv.org/abs/2202.05262",
    equations="eq. 2",
    use_when="one fact, one layer, and the fact is to be written in full",
    one_by_one=True,
    single_site=True,
)
def rome(problem: LayerProblem, config: RomeConfig) -> Delta:
    """One fact, one layer: the smallest change in C's metric with (W + Δ)k = v*.

    Δ = Λ (C⁻¹k)', Λ = (v* - Wk) / (C⁻¹k)'k (ROME eq. 2). The paper inverts C as it is; C is singular where the text
    has fewer tokens than d_in, so a small multiple of its mean eigenvalue is added. The equality holds for any such C.
    """
    assert problem.covariance is not None
    direction = problem.covariance.solve(problem.keys, config.damping)  # (d_in, 1)
    return Delta(problem.residual, direction.T / (direction * problem.keys).sum())
