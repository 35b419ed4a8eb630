"""The eigenvectors of a large symmetric matrix that hold most of its trace, without all the others.

Block Lanczos (Golub and Underwood 1977) with full reorthogonalization, Rayleigh-Ritz in the space that it spans, and
residuals that bound how far what is found is from what a full eigendecomposition would give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 16
"""Vectors that are multiplied by the matrix at once, at least: fewer are slower and need less of them in all."""
WIDE = 512
"""A matrix so many times as large as a block has a larger one, which costs it no more vectors."""
SMALL = 512
"""Up to this size all eigenvectors take no longer."""
TOLERANCE = 5e-5
"""Bound on the sine of the largest angle between the space that is found and the right one: what the projector makes of
any vector is then off by less than 1e-4 of its length."""
PRECISION = 1e-12
"""Residuals this small beside the largest eigenvalue are rounding: where two eigenvalues at the border are as good as
equal, neither of them is more right than the other."""
SHARE = 0.6
"""Of the size: a larger space than this costs what all eigenvectors do."""
FIRST_LOOK = 2.0
"""A space so many times as large as the one that first holds enough of the trace may hold the eigenvectors as well: it
took 2.2 to 2.6 times with every spectrum tried (`python -m tests.benchmarks.factors`)."""


def growth(share: float) -> float:
    """By how much a space that has this share of the size grows before it is looked at again: a look costs its third
    power, growing its first."""
    return 1 + max(0.04, share**2)


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

    Where λ_(q+1) is the first eigenvalue that is left, the sine of the angle is bounded by the length of all
    ‖residual_i‖ / (λ_i - λ_(q+1)), i up to q (Davis and Kahan 1970), which is brought below `TOLERANCE`.

    Args:
        left: share of the trace that they leave at most.
        most: how many of them at most, whatever they leave.
    """
    size = len(matrix)
    if size <= SMALL:
        return None
    krylov = _Krylov(matrix, (1 - left) * float(matrix.trace()), most or size)
    look, limit = 0.0, SHARE * size
    while krylov.size + krylov.block <= limit:
        krylov.grow()
        if not look and FIRST_LOOK * krylov.size > limit:
            return None
        look = look or FIRST_LOOK * krylov.size * krylov.holds_enough
        if look and krylov.size >= look:
            found = krylov.found()
            if found is not None:
                return found
            look = min(growth(krylov.size / size) * krylov.size, limit - krylov.block)
    return None


class _Krylov:
    """The space that a matrix makes of a block of random vectors, (size, d), and the matrix within it. Vectors are rows
    here: that way products with the matrix are twice as fast.

    wanted: of the trace, that is to be held, unless by `most` eigenvectors.
    """

    def __init__(self, matrix: Tensor, wanted: float, most: int) -> None:
        self.matrix, self.size, self.trace = matrix, 0, 0.0
        self.wanted, self.most = wanted, most
        self.block = max(BLOCK, len(matrix) // WIDE)
        draws = torch.Generator().manual_seed(0)
        first = torch.randn(len(matrix), self.block, generator=draws, dtype=torch.float64).to(matrix)
        self._space = matrix.new_empty(int(SHARE * len(matrix)), len(matrix))
        self._inside: list[Tensor] = []  # the diagonal blocks of the matrix within the space
        self._beside: list[Tensor] = []  # those below them
        self._next = torch.linalg.qr(first)[0].T.contiguous()

    def grow(self) -> None:
        """By a block of vectors."""
        begin, end = self.size, self.size + self.block
        self._space[begin:end] = self._next
        new = self._next @ self.matrix  # (block, d)
        inside = new @ self._next.T
        self._inside.append((inside + inside.T) / 2)
        self.size, self.trace = end, self.trace + float(inside.trace())
        known = self._space[:end]
        for _ in range(2):  # once more, for what rounding has left: without, lost directions come back as new ones
            new = new - (new @ known.T) @ known
        following, beside = torch.linalg.qr(new.T)
        self._next = following.T.contiguous()
        self._beside.append(beside)

    @property
    def holds_enough(self) -> bool:
        """Whether the whole space holds what the eigenvectors are to hold."""
        return self.trace >= self.wanted or self.size >= self.most

    def _within(self) -> Tensor:
        """The matrix within the space, (size, size)."""
        found: Tensor = torch.block_diag(*self._inside)
        for place, beside in enumerate(self._beside[:-1]):
            here, after = (slice(i * self.block, (i + 1) * self.block) for i in (place, place + 1))
            found[after, here], found[here, after] = beside, beside.T
        return found

    def found(self) -> Leading | None:
        """The leading eigenvectors, once they are precise."""
        values, within = torch.linalg.eigh(self._within())
        held = values.flip(0).cumsum(0)
        count = min(int((held < self.wanted).sum()) + 1, self.most)
        if count >= self.size:
            return None
        residuals = (self._beside[-1] @ within[-self.block :, -count:]).norm(dim=0)  # (count,)
        gaps = (values[-count:] - values[-count - 1]).clamp_min(1e-300)
        error = float((residuals / gaps).norm())
        if error > TOLERANCE and float(residuals.norm()) > PRECISION * float(values[-1]):
            return None
        vectors = self._space[: self.size].T @ within[:, -count:]
        rest = max(0.0, float(self.matrix.trace() - values[-count:].sum()))
        return Leading(values[-count:], vectors, rest, error)
