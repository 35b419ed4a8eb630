"""BetaEdit: AlphaEdit whose null space is held to plain text as well. Li et al., 2026."""

from __future__ import annotations

from pydantic import Field

from patchkit.maths.linalg import Delta, SoftNullSpace, preserving_solve
from patchkit.methods import LayerProblem, MethodConfig, method


class BetaEditConfig(MethodConfig):
    """Settings of BetaEdit."""

    null_energy: float = Field(0.3, gt=0, lt=1, description="share of plain text's key energy the null space may hold")
    preserve: float = Field(30.0, ge=0, description="l1: how many tokens of plain text one fact weighs against there")
    ridge: float = Field(0.25, gt=0, description="l2, in units of the text keys' mean squared norm in the null space")


@method(
    "betaedit",
    config=BetaEditConfig,
    paper="https://arxiv.org/abs/2605.09285",
    equations="the regularized solve in the null space",
    use_when="long sequences, in which the little that alphaedit changes for ordinary text adds up",
)
def betaedit(problem: LayerProblem, config: BetaEditConfig) -> Delta:
    """Least squares inside the null space of plain text's keys, against what they still have there.

    Δ = R K'P(KpKp' + KK' + l1·PCP + l2·I)⁻¹ on the null space, AlphaEdit's with MEMIT's term in it; with l1 = 0 it is
    AlphaEdit's. P and l2 are relative as there; the paper has l1 = 3000 and l2 = 10. It also takes P anew from text and
    edited keys every 1,000 edits; here P is that of the text alone, as earlier keys stand in the solve anyway.
    """
    covariance = problem.covariance
    assert covariance is not None
    l2 = config.ridge * covariance.null_energy(config.null_energy)
    if not l2 > 0:  # no null space at all: nothing may move
        return Delta(problem.residual, 0 * problem.keys.T)
    metric = SoftNullSpace(covariance, config.null_energy, l2, config.preserve)
    return preserving_solve(problem.residual, problem.keys, problem.prior, metric)
