"""The eigenvectors of a large symmetric matrix that hold most of its trace, without all the others.

Block Lanczos (Golub and Underwood 1977) with full reorthogonalization, Rayleigh-Ritz in the space that it spans, and
residuals that bound how far what is found is from what a full eigendecomposition would give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 16
"""Columns that are multiplied by the matrix at once, at least: fewer are slower and need less of them in all."""
WIDE = 512
"""A matrix so many times as large as a block has a larger one, which costs it no more columns."""
SMALL = 512
"""Up to this size all eigenvectors take no longer."""
TOLERANCE = 5e-5
"""Bound on the sine of the largest angle between the space that is found and the right one: what the projector makes of
any vector is then off by less than 1e-4 of its length."""
PRECISION = 1e-12
"""Residuals this small beside the largest eigenvalue are rounding: where two eigenvalues at the border are as good as
equal, neither of them is more right than the other."""
SHARE = 0.4
"""Of the size: a larger space than this costs what all eigenvectors do."""
FIRST_LOOK, GROWTH = 1.3, 1.08
"""By how much the space grows before it is looked at: once it holds enough of the trace, and again."""


@dataclass(frozen=True)
class Leading:
    """The fewest eigenvectors that hold all but at most a share of the trace.

    Attributes:
        values: their eigenvalues (q,), ascending.
        vectors: (d, q), orthonormal columns.
        rest: the trace of what is left, 0 where nothing is.
        error: bound on the sine of the largest angle to the right space; 0 where all eigenvectors were computed.
    """

    values: Tensor
    vectors: Tensor
    rest: float
    error: float = 0.0

    def to(self, device: torch.device) -> Leading:
        """The same on `device`."""
        return replace(self, values=self.values.to(device), vectors=self.vectors.to(device))


def leading_of(values: Tensor, vectors: Tensor, left: float) -> Leading:
    """From all eigenvalues (d,), ascending and none below 0, and eigenvectors (d, d); `left` as in `leading`."""
    rest = int((values.cumsum(0) <= left * values.sum()).sum())
    return Leading(values[rest:], vectors[:, rest:], float(values[:rest].sum()))


def leading(matrix: Tensor, left: float, most: int | None = None) -> Leading | None:
    """Those of a symmetric matrix (d, d) with no eigenvalue below zero; None where it takes all eigenvectors to tell.

    Where λ_q and λ_(q+1) are the eigenvalues on either side of the border, the angle is bounded by
    ‖residuals‖ / (λ_q - λ_(q+1)) (Davis and Kahan 1970), which is brought below `TOLERANCE`.

    Args:
        left: share of the trace that they leave at most.
        most: how many of them at most, whatever they leave.
    """
    size = len(matrix)
    if size <= SMALL:
        return None
    krylov, look = _Krylov(matrix, (1 - left) * float(matrix.trace()), most or size), 0
    while krylov.size + krylov.block <= SHARE * size:
        krylov.grow()
        look = look or krylov.first_look()
        if look and krylov.size >= look:
            look = int(GROWTH * krylov.size)
            found = krylov.found()
            if found is not None:
                return found
    return None


class _Krylov:
    """The space that a matrix makes of a block of random columns, (d, size), and the matrix within it.

    wanted: of the trace, that is to be held, unless by `most` eigenvectors.
    """

    def __init__(self, matrix: Tensor, wanted: float, most: int) -> None:
        self.matrix, self.size, self.trace = matrix, 0, 0.0
        self.wanted, self.most = wanted, most
        self.block = max(BLOCK, len(matrix) // WIDE)
        draws = torch.Generator().manual_seed(0)
        first = torch.randn(len(matrix), self.block, generator=draws, dtype=torch.float64).to(matrix)
        room = int(SHARE * len(matrix))
        self._space = matrix.new_empty(room, len(matrix))  # rows, so that the part in use is contiguous
        self._within = matrix.new_zeros(room, room)
        self._next = torch.linalg.qr(first)[0]
        self._last = matrix.new_zeros(self.block, self.block)

    def grow(self) -> None:
        """By a block of columns."""
        begin, end = self.size, self.size + self.block
        self._space[begin:end] = self._next.T
        new = self.matrix @ self._next  # (d, block)
        inside = self._next.T @ new
        self._within[begin:end, begin:end] = (inside + inside.T) / 2
        if begin:
            before = slice(begin - self.block, begin)
            self._within[before, begin:end], self._within[begin:end, before] = self._last.T, self._last
        self.size, self.trace = end, self.trace + float(inside.trace())
        known = self._space[:end]
        for _ in range(2):  # once more, for what rounding has left
            new = new - known.T @ (known @ new)
        self._next, self._last = torch.linalg.qr(new)

    def first_look(self) -> int:
        """At which size the eigenvectors may be there, once it can be told: the whole space has to hold what they are
        to hold before they do, and converging takes more steps."""
        if self.trace < self.wanted and self.size < self.most:
            return 0
        return int(FIRST_LOOK * self.size) + 4 * self.block

    def found(self) -> Leading | None:
        """The leading eigenvectors, once they are precise."""
        values, within = torch.linalg.eigh(self._within[: self.size, : self.size])
        held = values.flip(0).cumsum(0)
        count = min(int((held < self.wanted).sum()) + 1, self.most)
        if count >= self.size:
            return None
        residuals = float((self._last @ within[-self.block :, -count:]).norm())
        error = residuals / max(float(values[-count] - values[-count - 1]), 1e-300)
        if error > TOLERANCE and residuals > PRECISION * float(values[-1]):
            return None
        vectors = self._space[: self.size].T @ within[:, -count:]
        rest = max(0.0, float(self.matrix.trace() - values[-count:].sum()))
        return Leading(values[-count:], vectors, rest, error)
