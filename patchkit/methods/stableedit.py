"""StableEdit: lifelong editing with whitened gradients. 2026."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, MethodConfig, method
from patchkit.methods.ultraedit import normalized, ridge_solve


class StableEditConfig(MethodConfig):
    """Settings of StableEdit."""

    rate: float = Field(0.35, gt=0, description="η: length of a value, in units of the module's output at its key")
    ridge: float = Field(1e-2, gt=0, description="weight of ‖Δ‖², in units of the keys' mean squared norm")
    warm_up: float = Field(10.0, ge=0, description="columns that the running mean and variance begin with")
    floor: float = Field(1e-6, gt=0, description="least eigenvalue of the gradients' covariance, of its mean one")


@method(
    "stableedit",
    config=StableEditConfig,
    paper="https://arxiv.org/abs/2605.11836",
    equations="section 4",
    use_when="thousands of facts without subjects or statistics; before d_out gradients have been seen it is ultraedit",
    needs_statistics=False,
    targets="gradients",
)
def stableedit(problem: LayerProblem, config: StableEditConfig) -> Delta:
    """UltraEdit with gradients whitened by their covariance over all edits so far, once enough have been seen.

    v = -η ‖ĥ‖² ĝ and Δ = V K'(KK' + c·I)⁻¹, ĥ each feature over its running standard deviation, as in UltraEdit; ĝ is
    Σ^-1/2 (g - mean) once n > d_out + 1, with Σ = Σ(g - mean)(g - mean)'/(n - d_out - 1), else
    UltraEdit's. The paper edits nothing in its first 20 batches, which only fill the statistics, and then starts over
    with the model; here those facts are edited like the others. All of its rates are teacher-forced.
    """
    keys, gradients = problem.keys, problem.residual
    prior_keys, prior_gradients = problem.prior_gradients
    h = normalized(keys, prior_keys, config.warm_up)  # (d_in, n)
    every = torch.cat([prior_gradients, gradients], 1)  # (d_out, m + n)
    if every.shape[1] > len(every) + 1:
        g = whitened(gradients, every, config.floor)
    else:
        g = normalized(gradients, prior_gradients, config.warm_up)
    output = (problem.base_weight @ keys).square().sum(0).mean().sqrt()
    rate = config.rate * output / (len(h) * len(g) ** 0.5)
    values = -rate * h.square().sum(0) * g  # (d_out, n)
    return ridge_solve(values, keys, config.ridge * keys.square().sum(0).mean())


def whitened(columns: Tensor, every: Tensor, floor: float) -> Tensor:
    """Columns (d, n) less the mean of all of `every` (d, m), along each axis of their covariance over its root."""
    mean, count = every.mean(1, keepdim=True), every.shape[1]
    centered = every - mean
    values, axes = torch.linalg.eigh(centered @ centered.T / (count - len(every) - 1))
    least = (floor * values.mean()).clamp_min(torch.finfo(values.dtype).tiny)
    white: Tensor = axes @ ((axes.T @ (columns - mean)) / values.clamp_min(least).sqrt().unsqueeze(1))
    return white
