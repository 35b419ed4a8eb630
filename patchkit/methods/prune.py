"""PRUNE: perturbation-restrained sequential model editing. Ma et al., 2025."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, MethodConfig, wrapper
from patchkit.methods._factors import as_delta, as_stored, singular_triplets


class PruneConfig(MethodConfig):
    """Settings of PRUNE."""

    variant: Literal["log", "linear"] = Field("log", description="how singular values that are too large are damped")
    base: float = Field(1.2, gt=1, description="base of the logarithm, for the variant log")


@wrapper(
    "prune",
    config=PruneConfig,
    paper="https://arxiv.org/abs/2405.16821",
    equations="the function F on the singular values",
    use_when="long sequences whose accumulated change outgrows the weight itself",
)
def prune(problem: LayerProblem, config: PruneConfig, solve: Callable[[LayerProblem], Update]) -> Update:
    """Damps the singular values of everything changed so far where they exceed the base's largest one.

    With σ those of the accumulated change, and m the largest singular value of W before any edit, every σ > m becomes
    log_b(σ) - log_b(m) + m ("log", b = 1.2 as in the papers that compare with it) or (σ + m)/2 ("linear"). The paper
    does it once, after the last edit; here it is done at every solve, so that the model stays restrained in between.
    Where m is small the logarithm's published form would enlarge σ; it never may here.
    """
    inner = solve(problem)
    new = as_delta(inner, problem)
    total = Delta.stack([problem.earlier, new])
    largest = problem.once(largest_singular_value)
    u, values, v = singular_triplets(total)
    over = values > largest
    if not over.any():
        return inner
    excess = values[over] - damped(values[over], largest, config)
    return as_stored(Delta.stack([new, Delta(-u[:, over] * excess, v[:, over].T)]), inner)


def damped(values: Tensor, largest: float, config: PruneConfig) -> Tensor:
    """F(σ) for singular values (k,) above `largest`, never more than σ."""
    if config.variant == "linear":
        return (values + largest) / 2
    return torch.minimum((values / largest).log() / log(config.base) + largest, values)


def largest_singular_value(weight: Tensor) -> float:
    """That of W, from W W' or W'W, the smaller one."""
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
