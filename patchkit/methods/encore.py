"""ENCORE: norm-constrained sequential editing. Gupta et al., 2025."""

from __future__ import annotations

from pydantic import Field

from patchkit.maths.linalg import Damped, Delta, preserving_solve
from patchkit.methods import LayerProblem, MethodConfig, method


class EncoreConfig(MethodConfig):
    """Settings of ENCORE."""

    preserve: float = Field(150.0, gt=0, description="λ: how many tokens of plain text one edited fact weighs against")
    ridge: float = Field(15.0, gt=0, description="λₙ: weight of ‖Δ‖², in units of C's mean eigenvalue")


@method(
    "encore",
    config=EncoreConfig,
    paper="https://arxiv.org/abs/2502.01636",
    equations="eq. 10, the norm constraint",
    use_when="long sequences with MEMIT, whose changes it keeps short",
)
def encore(problem: LayerProblem, config: EncoreConfig) -> Delta:
    """MEMIT with a ridge, so that no change is longer than it has to be.

    Δ = R K'(λC + λₙI + KpKp' + KK')⁻¹. The paper's λₙ is 20 beside λ = 15000 for Llama 3 and 10 for smaller models, in
    the units of each model's own keys; here it is relative to C. Its other half, which ends a value's optimization when
    every prompt's target is the likeliest, is not part of a solve; `value.stop_loss` ends it here.
    """
    assert problem.covariance is not None
    metric = Damped(problem.covariance, config.ridge / config.preserve, config.preserve)
    return preserving_solve(problem.residual, problem.keys, problem.prior, metric)
