"""Methods that solve for weights side by side one by one, each for its share of what a fact lacks.

A share is in the measure in which the fact's key is in the block, x_e' G x_e of x' G x with the damped inverse of plain
text's second moments: the shares that the smallest change of the whole matrix gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkit.maths.blocks import in_blocks, turned
from patchkit.maths.rotations import Rotation
from patchkit.methods import Constraint, LayerProblem, Method, MethodConfig

DAMPING = 1.0
"""In units of the mean eigenvalue."""


def shares(problem: LayerProblem) -> Tensor:
    """Of each block in each fact's residual, (blocks, n), adding up to 1."""
    metric = problem.keys if problem.covariance is None else problem.covariance.solve(problem.keys, DAMPING)
    energy: Tensor = (problem.keys * metric).unflatten(0, (problem.blocks, -1)).sum(1)  # (blocks, n)
    return energy / energy.sum(0).clamp_min(torch.finfo(energy.dtype).tiny)


def solve_block_by_block(method: Method, settings: MethodConfig, problem: LayerProblem) -> Rotation:
    """The method's rotation of every block that a key is in, as one of the whole matrix's keys."""
    share, parts = shares(problem), dict[int, Rotation]()
    for block in in_blocks(problem.keys, problem.blocks):
        part = method.solve(problem.of_block(block, problem.residual * share[block]), settings)
        assert isinstance(part, Rotation)
        parts[block] = part
    return turned(parts, problem.blocks, len(problem.keys) // problem.blocks)


def constrain_block_by_block(method: Method, problem: LayerProblem, settings: Any) -> Constraint:
    """What is left of a value where each block is held to what it can give of its share."""
    assert method.constrain is not None
    share = shares(problem)
    parts = [
        (share[block], method.constrain(problem.of_block(block, problem.residual * share[block]), settings))
        for block in in_blocks(problem.keys, problem.blocks)
    ]

    def constrain(facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
        held = torch.zeros_like(delta)
        for part, of_block in parts:
            weight = part.to(delta)[facts].unsqueeze(1)  # (k, 1)
            held = held + of_block(facts, start, weight * delta)
        return held

    return constrain
