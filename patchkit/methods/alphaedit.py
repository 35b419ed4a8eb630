"""AlphaEdit: null-space constrained knowledge editing. Fang et al., 2025."""

from __future__ import annotations

from pydantic import Field

from patchkit.maths.linalg import Delta, NullSpace, preserving_solve
from patchkit.methods import LayerProblem, MethodConfig, method


class AlphaEditConfig(MethodConfig):
    """Settings of AlphaEdit."""

    null_energy: float = Field(0.3, gt=0, lt=1, description="share of plain text's key energy the null space may hold")
    ridge: float = Field(0.25, gt=0, description="l2 of eq. 14, in units of the text keys' mean squared norm in it")


@method(
    "alphaedit",
    config=AlphaEditConfig,
    paper="https://arxiv.org/abs/2410.02355",
    equations="eq. 8-14",
    use_when="the default: many facts, at once or one after another; what comes up in ordinary text is left alone",
)
def alphaedit(problem: LayerProblem, config: AlphaEditConfig) -> Delta:
    """Least squares inside the null space of plain text's keys, earlier edits protected.

    Δ = R K'P(KpKp'P + KK'P + l2·I)⁻¹ (AlphaEdit eq. 14; the paper has l2 = 1, its code other numbers per model).
    P keeps the eigenvectors that together hold at most `null_energy` of the text's key energy, where the paper has
    an absolute threshold on eigenvalues. l2 is relative to the mean squared norm of the text's projected keys, because
    an absolute one depends on the scale of the model's activations; edited subjects' keys have 2 to 4 times that.
    """
    covariance = problem.covariance
    assert covariance is not None
    l2 = config.ridge * covariance.null_energy(config.null_energy)
    if not l2 > 0:  # no null space at all: nothing may move
        return Delta(problem.residual, 0 * problem.keys.T)
    metric = NullSpace(covariance, config.null_energy, l2)
    return preserving_solve(problem.residual, problem.keys, problem.prior, metric)
