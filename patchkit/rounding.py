"""Rounding a changed weight to a 16-bit grid so that the change survives it.

A patch changes entries by far less than the distance between two bfloat16 numbers; rounded one by one, most of them go
back to where they were. Here each column's rounding error is made up for by the columns after it, so that what is left
of it is small in H = KEY_WEIGHT·KK'/tr(KK') + C/tr(C) + floor·I: along the edited keys K and on plain text's keys C.

The first pass takes GPTQ's order (Frantar et al. 2022, arXiv 2210.17323) in the form of Chee et al. 2023
(arXiv 2307.13304): with H = U D U', U unit upper triangular, column k is rounded after subtracting the errors before it
times U. A second sweep rounds each column once more with all others held fixed, which cannot make tr(E H E') larger and
takes the error along the keys to a third or less.

H is kept as floor·I + G G' with G (d_in, r) and never formed: C has a long, flat tail, and keeping its TEXT_DIRECTIONS
largest directions gave the same errors as the whole of it (within 1 % at d_in 1024), in memory linear in d_in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KEY_WEIGHT = 2.0  # keys against text: at 1 the keys keep twice the error, from 4 on text may fare worse than by nearest
DAMPING = 1e-2  # share of H that is the same in all directions
ISOTROPIC = 0.1  # what stands for C/tr(C) where there are no statistics, as a share of I/d_in
TEXT_DIRECTIONS, KEY_DIRECTIONS = 256, 512
BLOCK = 64


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
class Metric:
    """H = floor·I + basis @ basis', basis (d_in, r) in float64."""

    basis: Tensor
    floor: float

    @classmethod
    def of(cls, keys: Tensor, text: Spectrum | None) -> Metric:
        """The metric of edited keys (d_in, n), n possibly 0, and of plain text where its statistics are at hand.

        Without them every direction counts the same beside the keys.
        """
        d_in = keys.shape[0]
        floor = (ISOTROPIC if text is None else DAMPING) / d_in
        parts = [keys.new_zeros(d_in, 0, dtype=torch.float64)]
        if float(keys.square().sum()) > 0:
            scaled = keys.double() * (KEY_WEIGHT**0.5 / keys.double().norm())
            parts.append(_largest(scaled, KEY_DIRECTIONS))
            floor += max(0.0, KEY_WEIGHT - float(parts[-1].square().sum())) / d_in
        if text is not None:
            parts.append(text.vectors.double() * ((text.values.double() - text.tail).clamp_min(0) / text.total).sqrt())
            floor += text.tail / text.total
        return cls(torch.cat(parts, 1), floor)


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
    """What rounding columns start..stop takes: the part of the basis, the share of S to take off, and U."""

    start: int
    stop: int
    basis: Tensor  # (columns, r)
    gain: Tensor  # (columns, r)
    forward: Tensor  # (columns, columns), unit upper triangular: errors before a column onto it, first pass
    exchange: Tensor  # (columns, columns), H's block over its diagonal: changes onto a column, later sweeps
    diagonal: Tensor  # (columns, 1)


class Feedback:
    """Rounds one weight in a metric that is factored once, some columns of all rows at a time."""

    def __init__(self, metric: Metric, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is what is computed in; it has to hold the weights to be rounded exactly."""
        self._floor = metric.floor
        self._blocks = [_cast(block, dtype) for block in _factor(metric.basis, metric.floor)]

    def round(self, wanted: Callable[[slice], Tensor], rounded: Tensor) -> None:
        """Put weights near the wanted ones on the grid of `rounded`'s dtype, so that the error in H is small.

        Args:
            wanted: some columns of the weights, transposed: (columns, rows). Asked for twice rather than kept, so that
                nothing as large as the weight is held in the wide dtype.
            rounded: where the result goes, (d_in, rows), a view of any strides.
        """
        basis = self._blocks[0].basis
        missed = basis.new_zeros(basis.shape[1], rounded.shape[1])  # S = G'E', (r, rows)
        for block in self._blocks:
            columns = slice(block.start, block.stop)
            own = wanted(columns)
            goal = torch.addmm(own, block.gain, missed, alpha=-1)  # (columns, rows)
            result, _ = _round_in_turn(goal, goal, block.forward, rounded.dtype)
            missed.addmm_(block.basis.T, result - own)
            rounded[columns] = result
        for block in self._blocks:
            columns = slice(block.start, block.stop)
            before = rounded[columns].to(basis.dtype).contiguous()
            slope = torch.addmm((before - wanted(columns)) * self._floor, block.basis, missed)  # (columns, rows)
            goal = before - slope / block.diagonal
            rounded[columns], moved = _round_in_turn(goal, before, block.exchange, rounded.dtype)
            missed.addmm_(block.basis.T, moved)


def _round_in_turn(goal: Tensor, start: Tensor, forward: Tensor, grid: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round `goal` column after column (rows here), each less what the ones before it moved times `forward`.

    Returns:
        The result and its difference from `start`, which is what moved: (columns, rows) each, in goal's dtype.
    """
    result, moved = torch.empty_like(goal), torch.empty_like(goal)
    moved_t = moved.T
    for k in range(len(goal)):
        exact = torch.addmv(goal[k], moved_t[:, :k], forward[:k, k], alpha=-1) if k else goal[k]
        result[k] = exact.to(grid)
        torch.sub(result[k], start[k], out=moved[k])
    return result, moved


def _factor(basis: Tensor, floor: float) -> list[_Block]:
    """H's factors, block after block, each given that all columns behind it will make the best of what is missed.

    Behind a block with rows G' of the basis lies M = (I + G'ᵀG'/floor)⁻¹, (r, r): what of S no later column can undo.
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
        upper = torch.linalg.cholesky(system.flip(0, 1)).flip(0, 1)  # A = upper @ upper'
        whole = own @ own.T + ridge
        diagonal = whole.diagonal().unsqueeze(1)
        blocks.append(
            _Block(
                start,
                start + len(own),
                own,
                torch.linalg.solve(system, kept.T),
                upper / upper.diagonal(),
                whole / diagonal.T,
                diagonal,
            )
        )
        undone = undone + own.T @ own / floor
    return blocks[::-1]


def _cast(block: _Block, dtype: torch.dtype) -> _Block:
    tensors = (block.basis, block.gain, block.forward, block.exchange, block.diagonal)
    return _Block(block.start, block.stop, *(t.to(dtype) for t in tensors))
