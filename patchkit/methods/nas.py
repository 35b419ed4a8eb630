"""NAS, norm-anchor scaling: norm anchors make model edits last. Liu et al., 2026."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.covariance import Covariance
from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, MethodConfig, wrapper


class NasConfig(MethodConfig):
    """Settings of NAS."""

    anchor: float = Field(2.0, gt=0, description="longest value, in units of the base's mean output on plain text")
    both_ways: bool = Field(
        False,
        description="scale shorter values up to the anchor as well, and drop those over twice it, as the paper does",
    )


@wrapper(
    "nas",
    config=NasConfig,
    paper="https://arxiv.org/abs/2602.02543",
    equations="v* scaled to a reference norm of the unedited model",
    use_when="long sequences: stops changes and weights from making each other grow",
    needs_statistics=True,
)
def nas(problem: LayerProblem, config: NasConfig, solve: Callable[[LayerProblem], Update]) -> Update:
    """Values are scaled down to a length that the unedited model's own outputs set.

    Each column of V = WK + R becomes V·min(1, m/‖V‖), and R what is then missing. m is `anchor` times the root mean
    square of ‖W₀k‖ over plain text, √tr(W₀CW₀'); a fact whose output is longer than that already may keep its length.
    The paper (version 3) rescales in both directions, once, at the value's layer, to the mean norm of values optimized
    on the unedited model, and drops values over twice that norm; `both_ways` does that. Here it is done at every site,
    on its share of the residual, where scaling up changes outputs that no fact wants changed.
    """
    assert problem.covariance is not None
    mean = problem.once(mean_output, problem.covariance)
    now = problem.weight @ problem.keys  # (d_out, n)
    wanted = now + problem.residual
    longest = torch.maximum(config.anchor * mean, now.norm(dim=0))  # (n,)
    tiny = torch.finfo(wanted.dtype).tiny
    if config.both_ways:
        length, m = wanted.norm(dim=0), config.anchor * mean
        edited = problem.residual.norm(dim=0) > 0  # a value that is there already stays as it is
        kept = (m / length.clamp_min(tiny)) * wanted - now  # (d_out, n)
        return solve(problem.replace(residual=torch.where(edited & (length <= 2 * m), kept, torch.zeros_like(now))))
    scale = (longest / wanted.norm(dim=0).clamp_min(tiny)).clamp_max(1)
    # Written so that a zero residual stays exactly zero.
    return solve(problem.replace(residual=problem.residual * scale - now * (1 - scale)))


def mean_output(weight: Tensor, covariance: Covariance) -> Tensor:
    """The root mean square of ‖Wk‖ over plain text, ()."""
    return (covariance.times(weight) * weight).sum().clamp_min(0).sqrt()
