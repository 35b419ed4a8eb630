"""WilKE: wise-layer knowledge editor. Hu et al., 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, MethodConfig, method
from patchkit.methods.rome import RomeConfig, rome


class WilkeConfig(RomeConfig):
    """Settings of WilKE: ROME's."""


def wisest(problems: Sequence[LayerProblem], config: MethodConfig) -> int:
    """Place of the layer that needs the smallest change for one fact: argmin_l ‖δ_l‖ / (‖W_l‖₂ ‖k_l‖).

    WilKE section 5, which MOSE's eq. 22 takes over: the norm of the rank-one change that brings the fact's key k_l to
    its value, relative to the weight's spectral norm. Every problem holds the column of that fact alone.
    """
    needed = [p.residual.norm() / (p.once(spectral_norm) * p.keys.norm()) for p in problems]  # () each
    return int(torch.stack([each.to(needed[0].device) for each in needed]).argmin())


def spectral_norm(weight: Tensor) -> Tensor:
    """‖W‖₂, ()."""
    norm: Tensor = torch.linalg.matrix_norm(weight, 2)
    return norm


@method(
    "wilke",
    config=WilkeConfig,
    paper="https://arxiv.org/abs/2402.10987",
    equations="section 5, layer selection; ROME eq. 2",
    use_when="one fact at a time, where no one layer suits all facts; a value is optimized at every candidate layer",
    one_by_one=True,
    choose=wisest,
)
def wilke(problem: LayerProblem, config: WilkeConfig) -> Update:
    """ROME at the layer that suits each fact best.

    The paper's candidates are all layers; here they are those of the recipe, a value being optimized at each of them.
    """
    return rome(problem, config)
