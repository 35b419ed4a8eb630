"""The projection of AlphaEdit around any additive method. Fang et al., 2025."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, MethodConfig, wrapper
from patchkit.methods._factors import as_delta, as_stored


class NullSpaceConfig(MethodConfig):
    """Settings of the null-space projection."""

    energy: float = Field(0.3, gt=0, lt=1, description="share of plain text's key energy the null space may hold")


@wrapper(
    "nullspace",
    config=NullSpaceConfig,
    paper="https://arxiv.org/abs/2410.02355",
    equations="eq. 8-10",
    use_when="a method should leave alone what comes up in ordinary text, as alphaedit does",
    needs_statistics=True,
)
def nullspace(problem: LayerProblem, config: NullSpaceConfig, solve: Callable[[LayerProblem], Update]) -> Update:
    """The change projected onto the null space of plain text's keys: ΔP.

    The one line that the paper adds to MEMIT, PRUNE and RECT (its figures 6 and 7); P is AlphaEdit's, with the same
    share of energy in place of the paper's absolute threshold. Unlike AlphaEdit the inner method does not know of P, so
    its edit loses whatever P takes away.
    """
    assert problem.covariance is not None
    inner = solve(problem)
    new = as_delta(inner, problem)
    return as_stored(Delta(new.left, problem.covariance.project_null(new.right.T, config.energy).T), inner)
