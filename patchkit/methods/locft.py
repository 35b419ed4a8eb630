"""LocFT-BF: fine-tuning done right in model editing, localized and breadth-first. Yang et al., 2026."""

from __future__ import annotations

import torch
from pydantic import Field

from patchkit.maths.updates import Full
from patchkit.methods import LayerProblem, MethodConfig, method
from patchkit.methods.ft import mean_size


class LocFTConfig(MethodConfig):
    """Settings of LocFT-BF."""

    epochs: int = Field(25, ge=1, description="passes over the facts of a batch at most")
    rate: float = Field(2e-2, gt=0, description="length of one Adam step in each entry, in units of W's mean one")
    stop_loss: float = Field(1e-2, ge=0, description="done when the targets' mean loss is below this")
    order: int = Field(0, description="seed of the order in which minibatches come")


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
    assert problem.loss is not None
    size, parts = problem.once(mean_size), problem.part_losses or (problem.loss,)
    draw = torch.Generator().manual_seed(config.order)
    delta = torch.zeros_like(problem.base_weight)
    mean, square, step = torch.zeros_like(delta), torch.zeros_like(delta), 0
    for _ in range(config.epochs):
        losses = list[float]()
        for place in torch.randperm(len(parts), generator=draw).tolist():
            loss, gradient = parts[place](Full(delta))
            losses.append(loss)
            if loss < config.stop_loss:
                continue
            step += 1
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            spread = (square / (1 - 0.999**step)).sqrt() + 1e-8 * square.max().sqrt()
            delta = delta - config.rate * size * mean / (1 - 0.9**step) / spread.clamp_min(1e-300)
        if sum(losses) / len(losses) < config.stop_loss:
            break
    return Full(delta)
