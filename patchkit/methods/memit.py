"""MEMIT: mass-editing memory in a transformer. Meng et al., 2023."""

from __future__ import annotations

from pydantic import Field

from patchkit.maths.linalg import Damped, Delta, preserving_solve
from patchkit.methods import LayerProblem, MethodConfig, method


class MemitConfig(MethodConfig):
    """Settings of MEMIT."""

    preserve: float = Field(150.0, gt=0, description="λ: how many tokens of plain text one edited fact weighs against")
    damping: float = Field(1e-2, gt=0, description="added to C, in units of C's mean eigenvalue")


@method(
    "memit",
    config=MemitConfig,
    paper="https://arxiv.org/abs/2210.07229",
    equations="eq. 14",
    use_when="many facts at once, spread over several layers; the classical baseline",
)
def memit(problem: LayerProblem, config: MemitConfig) -> Delta:
    """Batch least squares against the second moment of plain text.

    Δ = R K'(λC + KpKp' + KK')⁻¹ (MEMIT eq. 14 with C₀ = λ·E[kk'], and the earlier keys' term that its sequential users
    add, AlphaEdit eq. 15). C is damped as in ROME, since text shorter than d_in tokens leaves it singular.
    """
    covariance = problem.covariance
    assert covariance is not None
    metric = Damped(covariance, config.damping, config.preserve)
    return preserving_solve(problem.residual, problem.keys, problem.prior, metric)
