"""MOSE: multiplicative orthogonal sequential editing for language models. Xu et al., 2026."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.rotations import Rotation, procrustes, rotation_from
from patchkit.methods import Constraint, LayerProblem, MethodConfig, method
from patchkit.methods._factors import Like
from patchkit.methods.wilke import wisest


class MoseConfig(MethodConfig):
    """Settings of MOSE."""

    preserve: float = Field(10.0, gt=0, description="λ of eq. 17: weight of plain text's outputs, in the edit's energy")
    earlier: float = Field(1.0, ge=0, description="weight of each earlier key's output beside an edited one's 1")
    values: Literal["sphere", "free"] = Field("sphere", description="free: the paper's, brought to that length last")
    choose_layer: bool = Field(False, description="eq. 21-22: each fact at one of the layers and both its neighbors")
    tolerance: float = Field(1e-4, gt=0, description="planes that turn by less, in radians, are left out")


def on_spheres(problem: LayerProblem, config: MoseConfig) -> Constraint:
    """Values that rotations can meet: ‖R W k‖ = ‖W k‖, so each site's target lies on the sphere of that radius.

    The sites' spheres are taken to be like the value site's: v* = Wk + Σ (‖Wk‖·t/‖t‖ - Wk), t = Wk + δ/sites.
    """
    outputs = Like((problem.weight @ problem.keys).T)  # (n, d_out)
    sites = problem.sites

    def constrain(facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
        if config.values == "free":
            return delta
        before = outputs(delta)[0][facts]  # (k, d_out)
        return sites * (_resized(before + delta / sites, before) - before)

    return constrain


def _resized(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (k, d) at the lengths of those of `like`."""
    length = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    resized: Tensor = rows * (like.norm(dim=1, keepdim=True) / length)
    return resized


@method(
    "mose",
    config=MoseConfig,
    paper="https://arxiv.org/abs/2601.07873",
    equations="eq. 15-22",
    use_when="comparing with MOSE as published: weights are turned and never grow",
    update="rotation",
    constrain=on_spheres,
    choose=wisest,
    neighbors=1,
)
def mose(problem: LayerProblem, config: MoseConfig) -> Rotation:
    """Rotates outputs, W' = R W: the singular values stay exactly as they are.

    R = UV' of M = UΣV' = λ·W C W' + V_E(W K_E)' + μ·(W Kp)(W Kp)' (eq. 17-20 with the earlier edits kept as well), the
    nearest rotation where that would be a reflection. λ is relative: at 1 plain text weighs as much as the mean edit,
    λ tr(W C W') = λ ‖W K_E‖² / n. V_E is brought to the length of W K_E, to which all that a rotation gives is bound.

    The paper edits, for each fact, the layer that eq. 21-22 choose and both its neighbors (`choose_layer`). All of the
    recipe's layers together need smaller turns of each and hold longer (docs/mose.md), so that is the default.

    The authors' released code is another method: a block-diagonal Cayley rotation on the input side, trained with Adam.
    """
    covariance, weight = problem.covariance, problem.weight
    assert covariance is not None
    outputs = weight @ problem.keys  # (d_out, n)
    targets = outputs + problem.residual
    if config.values == "sphere":
        targets = _resized(targets.T, outputs.T).T
    text = covariance.times(weight) @ weight.T  # W C W' (d_out, d_out)
    energy = outputs.square().sum() / max(1, outputs.shape[1])
    earlier = weight @ problem.prior_keys  # (d_out, m)
    moment = targets @ outputs.T + config.earlier * earlier @ earlier.T
    moment = moment + config.preserve * energy / text.trace() * text
    return rotation_from(procrustes(moment), "left", config.tolerance)
