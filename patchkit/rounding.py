"""Rounding a changed weight to a 16-bit grid so that the change survives it.

A patch changes entries by far less than the distance between two bfloat16 numbers; rounded one by one, most of them go
back to where they were. Here each column's rounding error is made up for by the columns after it, so that what is left
of it is small in H = KEY_WEIGHT·KK'/tr(KK') + C/tr(C) + floor·I: along the edited keys K and on plain text's keys C.

The first pass takes GPTQ's order (Frantar et al. 2022, arXiv 2210.17323) in the form of Chee et al. 2023
(arXiv 2307.13304): with H = U D U', U unit upper triangular, column k is rounded after subtracting the errors before it
times U. Later sweeps round each column once more with all others held fixed; none of them can make tr(E H E') larger.

H is kept as floor·I + G G' with G (d_in, r) and never formed: C has a long, flat tail, and keeping its TEXT_DIRECTIONS
largest directions gave the same errors as the whole of it (within 1 % at d_in 1024), in memory linear in d_in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEY_WEIGHT = 3.0  # keys against text: at 1 the keys keep twice the error, at 10 text is worse off than by nearest
DAMPING = 1e-2  # share of H that is the same in all directions
TEXT_DIRECTIONS, KEY_DIRECTIONS = 256, 512
BLOCK = 64
SWEEPS = 2


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

    def energy(self, error: Tensor) -> float:
        """tr(E C E') of E given transposed, (d_in, rows)."""
        seen = self.vectors.to(error.dtype).T @ error  # (r, rows)
        excess = (self.values - self.tail).to(error.dtype)
        return float(excess @ seen.square().sum(1)) + self.tail * float(error.square().sum())


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
        floor = (1.0 if text is None else DAMPING) / d_in
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
    """Rounds blocks of rows of one weight in a metric that is factored once."""

    def __init__(self, metric: Metric, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is what is computed in; it has to hold the weights to be rounded exactly."""
        # Columns with strong inputs go first: those left at the end have nothing after them to make up for them.
        self._order = metric.basis.square().sum(1).argsort(descending=True, stable=True)
        self._floor = metric.floor
        self._blocks = [_cast(block, dtype) for block in _factor(metric.basis[self._order], metric.floor)]

    def round(self, wanted: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights `wanted`, transposed (d_in, rows), on the grid of `dtype`, so that the error in H is small."""
        wanted = wanted[self._order]
        rounded = torch.empty_like(wanted, dtype=dtype)
        missed = wanted.new_zeros(self._blocks[0].basis.shape[1], wanted.shape[1])  # S = G'E', (r, rows)
        for block in self._blocks:
            part, own = rounded[block.start : block.stop], wanted[block.start : block.stop]
            goal = torch.addmm(own, block.gain, missed, alpha=-1)  # (columns, rows)
            _round_in_turn(goal, goal, block.forward, part)
            missed.addmm_(block.basis.T, part.to(own.dtype) - own)
        for _ in range(SWEEPS):
            for block in self._blocks:
                self._again(block, wanted[block.start : block.stop], rounded[block.start : block.stop], missed)
        result = torch.empty_like(rounded)
        result[self._order] = rounded
        return result

    def _again(self, block: _Block, wanted: Tensor, rounded: Tensor, missed: Tensor) -> None:
        """Round the block's columns once more, each to its best given all others; keeps `missed` up to date."""
        before = rounded.to(wanted.dtype)
        slope = torch.addmm((before - wanted) * self._floor, block.basis, missed)  # (columns, rows)
        changes = _round_in_turn(before - slope / block.diagonal, before, block.exchange, rounded)
        missed.addmm_(block.basis.T, changes)


def _round_in_turn(goal: Tensor, start: Tensor, forward: Tensor, out: Tensor) -> Tensor:
    """Round `goal` column after column (a row of the tensors) into `out`, each less what went before it times `forward`.

    Returns:
        `out` - `start`, (columns, rows): what `forward` carries on.
    """
    moved = torch.empty_like(goal)
    moved_t = moved.T
    for k in range(len(goal)):
        out[k] = torch.addmv(goal[k], moved_t[:, :k], forward[:k, k], alpha=-1) if k else goal[k]
        torch.sub(out[k], start[k], out=moved[k])
    return moved


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
