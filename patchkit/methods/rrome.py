"""R-ROME: rebuilding ROME, resolving model collapse during sequential model editing. Gupta et al., 2024."""

from __future__ import annotations

from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, method
from patchkit.methods.rome import RomeConfig, rome


class RRomeConfig(RomeConfig):
    """Settings of R-ROME."""


@method(
    "r-rome",
    config=RRomeConfig,
    paper="https://arxiv.org/abs/2403.07175",
    equations="ROME's eq. 2 with one and the same key throughout",
    use_when="a table lists ROME's corrected form by name; the same numbers as rome",
    one_by_one=True,
    single_site=True,
)
def rrome(problem: LayerProblem, config: RRomeConfig) -> Update:
    """ROME with the key averaged over the contexts on both sides of the fraction.

    ROME as released has Λ = (v* - Wk)/(C⁻¹k̄)'k with k of the bare prompt but k̄ the mean over contexts; where the two
    are far apart the denominator nearly vanishes, and one such edit destroys the model. R-ROME has k̄ in both places,
    as ROME's own equation has it. `rome` does so too, so this is `rome` under the name that tables use. One thing is
    as in the release in both: the residual is taken at the bare prompt, v* - Wk.
    """
    return rome(problem, config)
