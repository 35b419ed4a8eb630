"""Rounding a changed weight to a 16-bit grid so that the change survives it.

A patch changes entries by far less than the distance between two bfloat16 numbers; rounded one by one, most of them go
back to where they were. Here the columns after each column compensate its rounding error, so that the rest of it is
small in H = w·KK' + C/tr(C) + floor·I: along the edited keys K and on plain text's keys C.

The first pass takes GPTQ's order (Frantar et al. 2022, arXiv 2210.17323) in the form of Chee et al. 2023
(arXiv 2307.13304): with H = U D U', U unit upper triangular, columns are rounded after subtracting the errors before
them times U. Sweeps round each column once more with all others held fixed, which takes the error along the keys
to half or less. A few columns go at a time, which makes it matrix products: a tenth more error than one at a time.

H is kept as floor·I + G G' with G (d_in, r) and never formed: C has a long, flat tail, and keeping its TEXT_DIRECTIONS
largest directions gave the same errors as the whole of it (within 1 % at d_in 1024), in memory linear in d_in.

What to expect: with up to d_in / 16 keys the error along them falls below 1/8 of nearest's. On plain text it is below
nearest's, too, where C's eigenvalues fall like 1/i or faster and C is known. Where C is flat it is not, least of all
for changes far smaller than the grid: nearest is what minimizes the error in a metric that is the same in all
directions, and each entry moved for the keys' sake is off by more. There the error on text is up to 1.3 times that of
nearest at ‖Δ‖/‖W‖ = 1e-3 (and 1.1 times at 1e-2), and where C is not known up to 1.9 times (1.1 times).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.maths.onednn import linear

# Weight of keys against text in the typical column, times keys per column: less hurts the keys, more hurts text. The
# median and not the trace, which in real models a few columns with far larger numbers dominate.
KEY_WEIGHT = 32.0
UNKNOWN_TEXT = 512.0  # the same without statistics, where text cannot be protected
DAMPING = 1e-2  # share of H that is the same in all directions
TEXT_DIRECTIONS, KEY_DIRECTIONS = 256, 512
FEW_KEYS = 4  # fewer keys count as this many
FEW, MANY = 1 / 64, 1 / 32  # keys per column: a second sweep from MANY on; none up to FEW where text is unknown
_TINY = 1e-30
BLOCK, FIRST_STEP, SWEEP_STEP = 64, 16, 8


@dataclass(frozen=True)
class Spectrum:
    """The largest eigenpairs of C: values (r,) and vectors (d_in, r); `tail` is the mean of all others."""

    values: Tensor
    vectors: Tensor
    tail: float

    @property
    def total(self) -> float:
        """tr(C)."""
        return float(self.values.sum()) + self.tail * (self.vectors.shape[0] - len(self.values))


@dataclass(frozen=True)
class RoundingMetric:
    """H = floor·I + basis @ basis', basis (d_in, r) in float64, and how many sweeps rounding in it needs."""

    basis: Tensor
    floor: float
    sweeps: int

    @classmethod
    def of(cls, keys: Tensor, text: Spectrum | None) -> RoundingMetric:
        """The metric of edited keys (d_in, n), n possibly 0, and of plain text where its statistics are known.

        Without them all directions other than the keys count the same.
        """
        d_in, n = keys.shape
        floor = (1.0 if text is None else DAMPING) / d_in
        parts = [keys.new_zeros(d_in, 0, dtype=torch.float64)]
        energy = keys.double().square().sum(1)  # (d_in,)
        if float(energy.sum()) > 0:
            weight = (UNKNOWN_TEXT if text is None else KEY_WEIGHT) * max(n, FEW_KEYS) / d_in
            # Over the columns that the keys reach: of neurons of their own, those are few.
            shares = (energy / _text_energy(d_in, text))[energy > 0]
            scale = weight / float(shares.median().clamp_min(_TINY))
            parts.append(_largest(keys.double() * scale**0.5, KEY_DIRECTIONS))
            floor += max(0.0, scale * float(energy.sum()) - float(parts[-1].square().sum())) / d_in
        if text is not None:
            parts.append(text.vectors.double() * ((text.values.double() - text.tail).clamp_min(0) / text.total).sqrt())
            floor += text.tail / text.total
        sweeps = 2 if n > MANY * d_in else 0 if text is None and n <= FEW * d_in else 1
        return cls(torch.cat(parts, 1), floor, sweeps)


def _text_energy(d_in: int, text: Spectrum | None) -> Tensor:
    """diag(C) / tr(C), (d_in,); 1 / d_in each where nothing is known."""
    if text is None:
        return torch.full((d_in,), 1 / d_in, dtype=torch.float64)
    excess = (text.values.double() - text.tail).clamp_min(0)
    return (text.vectors.double().square() @ excess + text.tail) / text.total


def _largest(columns: Tensor, rank: int) -> Tensor:
    """At most `rank` columns whose outer products sum to those of `columns`, up to the smallest directions."""
    if columns.shape[1] <= rank:
        return columns
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the range is found by random projection
        left, sizes, _ = torch.svd_lowrank(columns, q=rank)
    return left * sizes


@dataclass(frozen=True)
class _Block:
    """What rounding columns start..stop needs: the part of the basis, the share of S to take off, and U."""

    start: int
    stop: int
    basis: Tensor  # (columns, r)
    gain: Tensor  # (columns, r)
    forward: Tensor  # (columns, columns), unit upper triangular: errors before a column onto it, first pass
    exchange: Tensor  # (columns, columns), H's block over its diagonal: changes onto a column, later sweeps
    diagonal: Tensor  # (columns, 1)
    step: int  # columns that a sweep may round at once


class Feedback:
    """Rounds one weight in a metric that is factored once, some columns of all rows at a time."""

    def __init__(self, metric: RoundingMetric, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is what is computed in; it has to hold the weights to be rounded exactly."""
        self._floor, self._sweeps = metric.floor, metric.sweeps
        self._blocks = [_cast(block, dtype) for block in _factor(metric.basis, metric.floor)]

    def round(self, wanted: Callable[[slice], Tensor], rounded: Tensor) -> None:
        """Round the wanted weights to the grid of `rounded`'s dtype, so that the error in H is small.

        Args:
            wanted: some columns of the weights, transposed: (columns, rows). Asked for twice rather than kept, so that
                nothing as large as the weight is held in the wide dtype.
            rounded: where the result goes, (d_in, rows), contiguous for speed.
        """
        basis = self._blocks[0].basis
        missed = basis.new_zeros(basis.shape[1], rounded.shape[1])  # S = G'E', (r, rows)
        for block in self._blocks:
            columns = slice(block.start, block.stop)
            own = wanted(columns)
            goal = own - linear(block.gain, missed.T)  # (columns, rows)
            step = FIRST_STEP if block.stop < len(rounded) else 1  # no later column compensates the last ones
            result, _ = _round_in_turn(goal, goal, block.forward, rounded.dtype, step)
            missed += linear(block.basis.T, (result - own).T)
            rounded[columns] = result
        for _ in range(self._sweeps):
            for block in self._blocks:
                self._sweep(block, wanted, rounded, missed)

    def _sweep(self, block: _Block, wanted: Callable[[slice], Tensor], rounded: Tensor, missed: Tensor) -> None:
        columns = slice(block.start, block.stop)
        before = rounded[columns].to(missed.dtype)
        slope = (before - wanted(columns)).mul_(self._floor).add_(linear(block.basis, missed.T))  # (columns, rows)
        goal = before - slope.div_(block.diagonal)
        rounded[columns], moved = _round_in_turn(goal, before, block.exchange, rounded.dtype, block.step)
        missed += linear(block.basis.T, moved.T)


def _round_in_turn(goal: Tensor, start: Tensor, forward: Tensor, grid: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """Round `goal`, `step` columns (rows here) at a time, each less what the ones before moved times `forward`.

    Returns:
        The result and its difference from `start`, which is what moved: (columns, rows) each, in goal's dtype.
    """
    result, moved = torch.empty_like(goal), torch.empty_like(goal)
    for k in range(0, len(goal), step):
        now = slice(k, k + step)
        exact = torch.addmm(goal[now], forward[:k, now].T, moved[:k], alpha=-1) if k else goal[now]
        result[now] = exact.to(grid)
        torch.sub(result[now], start[now], out=moved[now])
    return result, moved


def _factor(basis: Tensor, floor: float) -> list[_Block]:
    """H's factors, block after block, each given that all columns after it compensate as well as they can.

    After a block with rows G' of the basis lies M = (I + G'ᵀG'/floor)⁻¹, (r, r): what of S no later column can undo.
    With g the block's own rows, A = floor·I + g M gᵀ = U D Uᵀ is its metric and M gᵀ A⁻¹ its share of S.
    """
    r = basis.shape[1]
    undone = torch.eye(r, dtype=basis.dtype)  # (r, r)
    blocks = []
    for start in reversed(range(0, len(basis), BLOCK)):
        own = basis[start : start + BLOCK]  # (columns, r)
        kept = torch.cholesky_solve(own.T, torch.linalg.cholesky(undone))  # M gᵀ, (r, columns)
        ridge = floor * torch.eye(len(own), dtype=basis.dtype)
        system = own @ kept + ridge  # A, (columns, columns)
        flipped = torch.linalg.cholesky(system.flip(0, 1))
        upper = flipped.flip(0, 1)  # A = upper @ upper'
        whole = own @ own.T + ridge
        diagonal = whole.diagonal().unsqueeze(1)
        blocks.append(
            _Block(
                start,
                start + len(own),
                own,
                torch.cholesky_solve(kept.T.flip(0), flipped).flip(0),
                upper / upper.diagonal(),
                whole / diagonal.T,
                diagonal,
                _step(whole),
            )
        )
        undone = undone + own.T @ own / floor
    return blocks[::-1]


def _step(metric: Tensor) -> int:
    """SWEEP_STEP where columns next to each other share little, else 1: moved at once, they would all compensate the
    same error. Scaled to a diagonal of ones, a step in all of them overshoots where an eigenvalue reaches 2."""
    sizes = metric.diagonal().sqrt()
    scaled = metric / sizes / sizes.unsqueeze(1)
    parts = [scaled[k : k + SWEEP_STEP, k : k + SWEEP_STEP] for k in range(0, len(scaled), SWEEP_STEP)]
    padded = torch.stack([F.pad(part, (0, SWEEP_STEP - len(part)) * 2) for part in parts])
    return SWEEP_STEP if float(torch.linalg.eigvalsh(padded).max()) < 1.8 else 1


def _cast(block: _Block, dtype: torch.dtype) -> _Block:
    tensors = ("basis", "gain", "forward", "exchange", "diagonal")
    return replace(block, **{name: getattr(block, name).to(dtype) for name in tensors})
