"""UltraEdit: training-, subject- and memory-free lifelong editing. Gu et al., 2025."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, MethodConfig, method


class UltraEditConfig(MethodConfig):
    """Settings of UltraEdit."""

    rate: float = Field(0.35, gt=0, description="η: length of a value, in units of the module's output at its key")
    ridge: float = Field(1e-2, gt=0, description="weight of ‖Δ‖², in units of the keys' mean squared norm")
    warm_up: float = Field(10.0, ge=0, description="columns that the running mean and variance begin with")


@method(
    "ultraedit",
    config=UltraEditConfig,
    paper="https://arxiv.org/abs/2505.14679",
    equations="section 3",
    use_when="thousands of facts, without subjects or statistics, and fast: one forward and backward pass per batch",
    needs_statistics=False,
    targets="gradients",
)
def ultraedit(problem: LayerProblem, config: UltraEditConfig) -> Delta:
    """Least squares toward one step against the gradient, both normalized over all edits so far.

    Δ = V K'(KK' + c·I)⁻¹ with V = -η ‖h‖² g per column, where (h, g) are the columns of K and of the gradient G,
    less their running mean and over their running standard deviation. The paper has c = 1 and η per model; here both
    are relative, to the keys' mean squared norm and to what W puts out for them. Its normalization makes a
    first column zero and the next few noise, so here it begins with `warm_up` columns around zero of the usual size.
    """
    keys, gradients = problem.keys, problem.residual
    prior_keys, prior_gradients = problem.prior_gradients
    h = normalized(keys, prior_keys, config.warm_up)  # (d_in, n)
    g = normalized(gradients, prior_gradients, config.warm_up)  # (d_out, n)
    output = (problem.base_weight @ keys).square().sum(0).mean().sqrt()
    rate = config.rate * output / (len(h) * len(g) ** 0.5)
    values = -rate * h.square().sum(0) * g  # (d_out, n)
    return ridge_solve(values, keys, config.ridge * keys.square().sum(0).mean())


def normalized(columns: Tensor, earlier: Tensor, warm_up: float) -> Tensor:
    """Columns (d, n), each row less its mean and over its standard deviation, both over all of earlier (d, m) and n.

    They begin as those of `warm_up` columns with mean zero and the mean square of all entries, the same in each row.
    """
    every = torch.cat([earlier, columns], 1)  # (d, m + n)
    size = every.square().mean()
    count = every.shape[1] + warm_up
    mean = every.sum(1, keepdim=True) / count  # (d, 1)
    squares = (every - mean).square().sum(1, keepdim=True) + warm_up * (size + mean.square())  # (d, 1)
    deviation = (squares / max(count - 1, 1)).sqrt() + 1e-8 * size.sqrt()
    return (columns - mean) / deviation.clamp_min(torch.finfo(columns.dtype).tiny)


def ridge_solve(values: Tensor, keys: Tensor, ridge: Tensor) -> Delta:
    """V K'(KK' + ridge·I)⁻¹, by the smaller of the two equivalent systems."""
    d_in, n = keys.shape
    gram = keys.T @ keys if n <= d_in else keys @ keys.T
    system = gram + ridge * torch.eye(min(n, d_in), dtype=keys.dtype, device=keys.device)
    right = torch.linalg.solve(system, keys.T) if n <= d_in else torch.linalg.solve(system, keys).T
    return Delta(values, right)  # (d_out, n), (n, d_in)
