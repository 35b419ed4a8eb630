"""PMET: precise model editing. Li et al., 2024."""

from __future__ import annotations

from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, method
from patchkit.methods.memit import MemitConfig, memit


class PmetConfig(MemitConfig):
    """Settings of PMET, which are MEMIT's."""


@method(
    "pmet",
    config=PmetConfig,
    paper="https://arxiv.org/abs/2308.08742",
    equations="eq. 8-13",
    use_when="MEMIT whose values leave to attention what attention would have done; a baseline of AlphaEdit's paper",
    value_at="module_out",
    spread="root",
    attention=True,
)
def pmet(problem: LayerProblem, config: PmetConfig) -> Update:
    """MEMIT toward feed-forward states that were optimized along with attention's, which are then let go.

    The solve is MEMIT's, of a residual at the last site's feed-forward output, of which each site takes 1/√k while k
    are left (PMET eq. 13), since what is spread in equal parts arrives too weak.
    """
    return memit(problem, config)
