"""LocFT-BF: fine-tuning done right in model editing, localized and breadth-first. Yang et al., 2026."""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.maths.updates import Full
from patchkit.methods import LayerProblem, method
from patchkit.methods._adam import Adam, EpochsConfig, breadth_first
from patchkit.methods.ft import mean_size


class LocFTConfig(EpochsConfig):
    """Settings of LocFT-BF."""


@method(
    "locft",
    config=LocFTConfig,
    paper="https://arxiv.org/abs/2509.22072",
    equations="section 4: breadth-first minibatches, one matrix",
    use_when="what a published table compares with: the strongest plain fine-tuning; it writes the whole weight",
    update="full",
    single_site=True,
    needs_statistics=False,
    targets="none",
    ends=True,
)
def locft(problem: LayerProblem, config: LocFTConfig) -> Full:
    """Adam on one weight over all facts of a batch, epoch after epoch in minibatches, each target with its end.

    min L(W + Δ) by Adam (Kingma & Ba, algorithm 1) without decay or bounds: every epoch takes the minibatches in a new
    order, a step where a minibatch's loss is at least `stop_loss`, until an epoch's mean is below it. What makes it
    work in the paper is that no fact is finished before the next one begins, and that targets end where a text ends, so
    that generation stops. The rate is 5e-4 there, of weights some 0.02 large; here it is relative. A minibatch is what
    shares a pass (`value.parallel`, 100 in the paper), and breadth ends with `batch_size`.
    """
    delta, rate = torch.zeros_like(problem.base_weight), config.rate * problem.once(mean_size)
    adam = Adam(delta)

    def move(gradient: Tensor) -> None:
        nonlocal delta
        delta = delta - rate * adam.direction(gradient)

    breadth_first(problem, config, lambda: Full(delta), move)
    return Full(delta)
