"""O-Edit+: orthogonal subspace editing for language model sequential editing. Cai & Cao, 2024, section 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar
from warnings import warn

from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.methods import Constraint, LayerProblem, method
from patchkit.methods._factors import Like
from patchkit.methods.oedit import OverConfig, spared, underneath


class OEditPlusConfig(OverConfig):
    """Settings of O-Edit+."""

    constrain_values: bool = Field(
        True, description="optimize values inside the free directions; the paper only projects afterward"
    )
    warn_below: float = Field(0.2, ge=0, le=1, description="warn when less than this share of d_out is free")

    aliases: ClassVar[Mapping[str, str]] = {"aimed": "constrain_values"}


def inside(problem: LayerProblem, config: OEditPlusConfig) -> Constraint:
    """Holds a value's delta to the directions that are free at its site."""
    return partial(_cut, Like(*spared(problem, config)) if config.constrain_values else Like())


def _cut(bases: Like, facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
    for basis in bases(delta):
        delta = delta - delta @ basis @ basis.T  # (k, d)
    return delta


@method(
    "oedit+",
    config=OEditPlusConfig,
    paper="https://arxiv.org/abs/2410.11469",
    equations="eq. 15, 26, 28",
    use_when="many facts one after another, none of which disturbs those before; no more than the model is wide",
    needs_gradients=True,
    constrain=inside,
    spends_directions=True,
)
def oedit_plus(problem: LayerProblem, config: OEditPlusConfig) -> Delta:
    """MEMIT's or ROME's change projected off the outputs of earlier edits and of plain text's gradient.

    Δ - V_ΔW V_ΔW'Δ - V_∇G V_∇G'Δ with V_∇G itself orthogonal to V_ΔW. Only `left` changes. Every fact uses up one of
    the d_out directions, and the gradient its share; a warning comes before none are left. The paper
    projects values that were optimized without the constraint and so loses part of them; here values are optimized
    inside the free directions (`constrain_values`).
    """
    delta = underneath(problem, config)
    left, bases = delta.left, spared(problem, config)
    for basis in bases:
        left = left - basis @ (basis.T @ left)
    free = _rank_left(problem, bases)
    if free < config.warn_below * len(left):
        warn(
            f"O-Edit+ has {free} of {len(left)} directions left for new facts; "
            "apply the next ones with another method, or lower gradient_rate",
            stacklevel=2,
        )
    return Delta(left, delta.right)


def rank_left(problem: LayerProblem, config: OEditPlusConfig) -> int:
    """How many output directions the next edit may still use: d_out - r - q, less those of this batch."""
    return _rank_left(problem, spared(problem, config))


def _rank_left(problem: LayerProblem, bases: Sequence[Tensor]) -> int:
    taken = sum(basis.shape[1] for basis in bases)
    return max(0, len(problem.residual) - taken - problem.keys.shape[1])
