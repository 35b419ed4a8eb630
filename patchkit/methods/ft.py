"""FT: constrained fine-tuning. Zhu et al., "Modifying Memories in Transformer Models", 2020."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.updates import Full
from patchkit.methods import LayerProblem, MethodConfig, method
from patchkit.methods._adam import Adam


class FTConfig(MethodConfig):
    """Settings of constrained fine-tuning. Lengths are in units of W's root mean square entry."""

    steps: int = Field(25, ge=1, le=100_000, description="Adam steps at most")
    rate: float = Field(2e-2, gt=0, description="length of one Adam step in each entry")
    bound: float = Field(0.1, gt=0, description="most that an entry may change by")
    stop_loss: float = Field(1e-2, ge=0, description="done when the targets' mean loss is below this")


@method(
    "ft",
    config=FTConfig,
    paper="https://arxiv.org/abs/2012.00363",
    equations="eq. 3 with the L-infinity norm; FT-L of ROME section 3.4",
    use_when="a baseline: it writes the whole weight, and a fact cannot be taken out again",
    update="full",
    single_site=True,
    needs_statistics=False,
    targets="none",
)
def ft(problem: LayerProblem, config: FTConfig) -> Full:
    """Adam on one weight against the targets' loss, no entry moving by more than a bound.

    min L(W + Δ) with ‖Δ‖∞ <= δ, by Adam (Kingma & Ba, algorithm 1) with Δ clipped after each step. The papers give
    step and bound as absolute numbers, one pair per model; here they are relative to the weight's size.
    """
    assert problem.loss is not None
    size = problem.once(mean_size)
    delta = torch.zeros_like(problem.base_weight)
    adam = Adam(delta)
    for _ in range(config.steps):
        loss, gradient = problem.loss(Full(delta))
        if loss < config.stop_loss:
            break
        moved = delta - config.rate * size * adam.direction(gradient)
        delta = moved.clamp(-config.bound * size, config.bound * size)
    return Full(delta)


def mean_size(weight: Tensor) -> float:
    """The root mean square of W's entries."""
    return float(weight.square().mean().sqrt())
