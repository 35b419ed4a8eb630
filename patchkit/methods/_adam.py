"""Adam (Kingma & Ba 2014, algorithm 1) on one matrix, and epochs of minibatches in a new order each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, MethodConfig


class Adam:
    """The moments of one matrix's gradients."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._step = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """The next step at rate 1, to be subtracted; zero where gradients always were."""
        self._step += 1
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient.square()
        spread = (self._square / (1 - 0.999**self._step)).sqrt() + 1e-8 * self._square.max().sqrt()
        return self._mean / (1 - 0.9**self._step) / spread.clamp_min(1e-300)


class EpochsConfig(MethodConfig):
    """Settings of breadth-first fine-tuning."""

    epochs: int = Field(25, ge=1, description="passes over the facts of a batch at most")
    rate: float = Field(2e-2, gt=0, description="length of one Adam step in each entry, in units of W's mean one")
    stop_loss: float = Field(1e-2, ge=0, description="done when the targets' mean loss is below this")
    order: int = Field(0, description="seed of the order in which minibatches come")


def breadth_first(
    problem: LayerProblem, config: EpochsConfig, now: Callable[[], Update], move: Callable[[Tensor], None]
) -> None:
    """Every epoch takes the minibatches in a new order, and lets `move` act on the gradient (d_out, d_in) of those
    whose loss with the update `now` is at least `stop_loss`, until an epoch's mean is below it."""
    assert problem.loss is not None
    parts = problem.part_losses or (problem.loss,)
    draw = torch.Generator().manual_seed(config.order)
    for _ in range(config.epochs):
        losses = list[float]()
        for place in torch.randperm(len(parts), generator=draw).tolist():
            loss, gradient = parts[place](now())
            losses.append(loss)
            if loss >= config.stop_loss:
                move(gradient)
        if sum(losses) / len(losses) < config.stop_loss:
            break
