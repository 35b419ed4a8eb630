"""MOSE turned to the other side: a rotation of the keys inside the null space of plain text's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.rotations import Rotation, procrustes, rotation_from
from patchkit.methods import Constraint, LayerProblem, MethodConfig, method
from patchkit.methods._factors import Like


class MoseRightConfig(MethodConfig):
    """Settings of MOSE on the right side."""

    null_energy: float = Field(0.5, gt=0, lt=1, description="share of plain text's key energy that R may turn")
    earlier: float = Field(3.0, ge=0, description="weight of each earlier key beside an edited one's 1")
    identity_weight: float = Field(1e-3, gt=0, description="weight of ‖R - I‖², in the edited keys' mean energy")
    tolerance: float = Field(1e-4, gt=0, description="planes that turn by less, in radians, are left out")

    aliases: ClassVar[Mapping[str, str]] = {"still": "identity_weight"}


HALVINGS = 60
"""Of the interval in which a Lagrange multiplier is sought: to float64's precision."""


@dataclass(frozen=True)
class _Reach:
    """The null space N as W maps it: keys a = PK (d_in, n) in it, turned to b of the same length, give W b.

    room: N's dimensions; seen: V (d_in, r), orthonormal, the directions of N that W sees; outward: U/σ (d_out, r), with
    W V = Uσ.
    """

    room: int
    keys: Tensor
    seen: Tensor
    outward: Tensor

    @staticmethod
    def of(problem: LayerProblem, config: MoseRightConfig) -> _Reach:
        assert problem.covariance is not None
        room = problem.covariance.null_rank(config.null_energy)
        through = problem.covariance.project_null(problem.weight.T, config.null_energy)  # P W' (d_in, d_out)
        energy, left = torch.linalg.eigh(through.T @ through)
        kept = energy > 1e-6 * energy.max().clamp_min(torch.finfo(energy.dtype).tiny)
        outward = left[:, kept] / energy[kept].sqrt()  # (d_out, r)
        keys = problem.covariance.project_null(problem.keys, config.null_energy)
        return _Reach(room, keys, through @ outward, outward)

    @property
    def whole(self) -> bool:
        """Whether W sees all of N, as it does where it puts out more than it takes in: then only the direction of a key
        can be chosen, and its output's length is what it is."""
        return self.room == self.seen.shape[1]

    def _nearest(self, wanted: Tensor) -> Tensor:
        """V'b (r, n) of the length of a whose outputs are nearest to those of `wanted`, V'y (r, n).

        With σ² the energies of W N that is σ²V'y / (σ² + μ), with the μ that gives the length, found by halving. Where
        nothing is wanted, as of an expert that a fact does not go to, it is 0.
        """
        energy = 1 / self.outward.square().sum(0).unsqueeze(1)  # σ² (r, 1)
        pull, length = energy * wanted, self.keys.norm(dim=0)  # (r, n), (n,)
        tiny = torch.finfo(length.dtype).tiny
        low, high = -energy.min().expand_as(length), pull.norm(dim=0) / length.clamp_min(tiny)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            longer = (pull / (energy + middle).clamp_min(tiny)).norm(dim=0) > length
            low, high = torch.where(longer, middle, low), torch.where(longer, high, middle)
        found: Tensor = pull / (energy + high).clamp_min(tiny)
        return found

    def turned(self, residual: Tensor) -> Tensor:
        """b (d_in, n): the keys in N nearest to a, of the same length, with W b = W a + residual as far as possible.

        The part of b that W sees has to be y, the shortest one with that output; the rest makes up the length. Where
        y alone is longer than a, no rotation reaches the output, and y is cut to that length.
        """
        wanted = self.seen.T @ self.keys + self.outward.T @ residual  # V'y (r, n)
        if self.whole:
            return self.seen @ self._nearest(wanted)
        idle = self.keys - self.seen @ (self.seen.T @ self.keys)  # (d_in, n)
        length, reach = wanted.norm(dim=0), self.keys.norm(dim=0)  # (n,) each
        tiny = torch.finfo(length.dtype).tiny
        room = (reach.square() - length.square()).clamp_min(0).sqrt() / idle.norm(dim=0).clamp_min(tiny)
        turned: Tensor = self.seen @ (wanted * (reach / length.clamp_min(tiny)).clamp_max(1)) + idle * room
        return turned


def reach(problem: LayerProblem, config: MoseRightConfig) -> Constraint:
    """Values that a rotation can meet: each site's share of the delta is clipped to the reach of the value site's key.

    Without this most facts need 1 to 2 times the reach, and the rotation falls short of its target.
    """
    at, sites = _Reach.of(problem, config), problem.sites
    inward, own = at.outward.T, at.seen.T @ at.keys  # (r, d_out), V'a (r, n)
    through = torch.linalg.pinv(inward)  # Uσ (d_out, r)
    parts = Like(own.T, inward.T, through.T, at.keys.norm(dim=0).unsqueeze(1))

    def constrain(facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
        keys, inward, through, most = parts(delta)
        before = keys[facts]  # (k, r)
        wanted = before + delta @ inward / sites  # (k, r)
        stretch = most[facts] / wanted.norm(dim=1, keepdim=True).clamp_min(1e-30)
        met = wanted * (stretch if at.whole else stretch.clamp_max(1))
        held: Tensor = sites * (met - before) @ through  # (k, d_out)
        return held

    return constrain


@method(
    "mose-right",
    config=MoseRightConfig,
    paper="https://arxiv.org/abs/2601.07873",
    equations="eq. 15-20 with W' = W R, and AlphaEdit eq. 9 for where R may act",
    use_when="very many facts one after another: weights are turned and never grow (norm and condition number stay)",
    update="rotation",
    constrain=reach,
    block_by_block=True,
)
def mose_right(problem: LayerProblem, config: MoseRightConfig) -> Rotation:
    """Rotates keys, W' = W R, inside the null space of plain text's: singular values stay, and text outside of it.

    A left rotation turns all outputs alike; on the right it can single out keys, and is not bound to ‖Wk‖. R is the
    identity on the eigenvectors that hold all but `null_energy` of the text's key energy (AlphaEdit's guarantee), and
    in the rest, N, the minimizer of Σ‖Ra - b‖² + `earlier`·Σ‖Rp - p‖² + `identity_weight`·‖R - I‖² over rotations: a, p
    are PK and PKp, P the projector on N, b is what `_Reach.turned` gives. That is Procrustes' problem (MOSE eq. 18-20)
    in key space; only the span of a, b and p moves, so R - I is of low rank and the update is exactly a LoRA.
    """
    at = _Reach.of(problem, config)
    if not at.room:  # nothing may turn
        return Rotation("right", problem.keys[:, :0], problem.keys[0, :0])
    target = at.turned(problem.residual)  # b (d_in, n)
    assert problem.covariance is not None
    earlier = problem.covariance.project_null(problem.prior_keys, config.null_energy)  # (d_in, m)
    span = torch.linalg.qr(torch.cat([at.keys, target, earlier], 1))[0]  # (d_in, s)
    keys, target, earlier = span.T @ at.keys, span.T @ target, span.T @ earlier
    floor = config.identity_weight * keys.square().sum() / max(1, keys.shape[1])
    moment = target @ keys.T + config.earlier * earlier @ earlier.T  # (s, s)
    moment = moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return rotation_from(procrustes(moment), "right", config.tolerance, basis=span)
