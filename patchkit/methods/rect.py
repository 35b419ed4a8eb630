"""RECT: model editing harms general abilities of large language models. Gu et al., 2024."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from pydantic import Field

from patchkit.maths.updates import Full, Update
from patchkit.methods import LayerProblem, MethodConfig, wrapper
from patchkit.methods._factors import as_delta


class RectConfig(MethodConfig):
    """Settings of RECT."""

    keep: float = Field(0.4, gt=0, le=1, description="share of the weight's entries that may change")


@wrapper(
    "rect",
    config=RectConfig,
    paper="https://arxiv.org/abs/2401.04700",
    equations="the top k % by relative change",
    use_when="comparing with RECT; the patch is as large as the weights it changes",
    update="full",
)
def rect(problem: LayerProblem, config: RectConfig, solve: Callable[[LayerProblem], Update]) -> Full:
    """Keeps only the entries of the update that change most, by |Δ|/|W|.

    The others, which contribute little to the edit, stay as they were (40 % are kept, as in the paper's comparisons). W
    is the weight as it is now, earlier edits included.
    """
    dense = as_delta(solve(problem), problem).dense()  # (d_out, d_in)
    tiny = torch.finfo(dense.dtype).tiny
    relative = (dense.abs() / problem.weight.abs().clamp_min(tiny)).flatten()
    kept = relative.topk(ceil(config.keep * len(relative)), sorted=False).indices
    matrix = torch.zeros_like(dense).flatten()
    matrix[kept] = dense.flatten()[kept]
    return Full(matrix.view_as(dense))
