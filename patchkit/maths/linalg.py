"""Linear algebra of the editing methods: tensors in, tensors out, on the device and in the dtype of the input.

Orientation throughout: a weight W is (d_out, d_in); keys K (d_in, n) and residuals R (d_out, n) are columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.maths.covariance import Covariance


@dataclass(frozen=True)
class Delta:
    """An additive update W' = W + left @ right, kept in its factors: left (d_out, r), right (r, d_in)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of `left`, an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The full (d_out, d_in) matrix."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm of left @ right, from the two small Gram matrices: ‖AB‖² = tr(A'A · BB')."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)  # (r, r)
        return float(gram.sum().clamp_min(0).sqrt())

    def to(self, *args: object, **kwargs: object) -> Delta:
        """Both factors through `Tensor.to`."""
        return Delta(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))  # type: ignore[call-overload]

    @staticmethod
    def stack(deltas: list[Delta]) -> Delta:
        """Their sum, by laying the factors side by side."""
        return Delta(torch.cat([d.left for d in deltas], 1), torch.cat([d.right for d in deltas], 0))


@dataclass(frozen=True)
class Damped:
    """G = (weight · (C + damping·mean(eigenvalues)·I))⁻¹: MEMIT's metric. Called with columns (d_in, n)."""

    covariance: Covariance
    damping: float
    weight: float

    def __call__(self, columns: Tensor) -> Tensor:
        return self.covariance.solve(columns, self.damping) / self.weight


@dataclass(frozen=True)
class NullSpace:
    """G = P / l2 with P as in `Covariance.project_null`: AlphaEdit's metric. Called with columns (d_in, n)."""

    covariance: Covariance
    energy: float
    l2: float

    def __call__(self, columns: Tensor) -> Tensor:
        return self.covariance.project_null(columns, self.energy) / self.l2


@dataclass(frozen=True)
class SoftNullSpace:
    """G = P (weight·C + l2·I)⁻¹ P, P as in `Covariance.project_null`: BetaEdit's. Called with columns (d_in, n)."""

    covariance: Covariance
    energy: float
    l2: float
    weight: float

    def __call__(self, columns: Tensor) -> Tensor:
        inside = self.covariance.project_null(columns, self.energy)
        if not self.weight:
            return inside / self.l2
        solved = self.covariance.shifted_solve(inside, self.l2 / self.weight) / self.weight
        return self.covariance.project_null(solved, self.energy)


SolveMetric = Damped | NullSpace | SoftNullSpace
"""The symmetric G of a solve's penalty tr(Δ G⁻¹ Δ'), as a function of columns (d_in, n). Equal ones do the same."""


class PriorKeys:
    """The keys of earlier edits at one site, (d_in, m), with a cached inverse that grows with them.

    Immutable; `extended` gives a new one and hands the cache on to it, so that a batch of n keys costs
    O((m + d_in) · n · min(m, d_in)) however many came before; solving with the older one again costs a new inverse.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._pieces = [matrix]
        self._count = matrix.shape[1]
        self._inverses: dict[SolveMetric, _Inverse] = {}
        self._source: PriorKeys | None = None  # the last one before it with a cached inverse

    def __len__(self) -> int:
        """m."""
        return self._count

    @property
    def matrix(self) -> Tensor:
        """Kp, (d_in, m)."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, 1)]
        return self._pieces[0]

    def extended(self, keys: Tensor) -> PriorKeys:
        """With keys (d_in, n) after its own."""
        longer = PriorKeys(keys)
        longer._pieces = _joined([*self._pieces, keys], 1)
        longer._count = self._count + keys.shape[1]
        longer._source = self if self._inverses else self._source
        return longer

    def inverse(self, metric: SolveMetric) -> Callable[[Tensor], Tensor]:
        """(G⁻¹ + Kp Kp')⁻¹, read as G - G Kp (I + Kp'G Kp)⁻¹ Kp'G where G is singular, as a function of columns."""
        if metric not in self._inverses:
            source, self._source = self._source, None
            inherited = None if source is None else source._inverses.pop(metric, None)
            if source is None or inherited is None:
                inherited = _Inverse(metric, self.matrix)
            else:
                inherited.extend(self._last(len(self) - len(source)))
            self._inverses = {metric: inherited}
        return self._inverses[metric]

    def _last(self, count: int) -> Tensor:
        """The last `count` columns, without concatenating the others."""
        found: list[Tensor] = []
        for piece in reversed(self._pieces):
            if count > 0:
                found.insert(0, piece[:, -count:])
            count -= piece.shape[1]
        return torch.cat(found, 1)


class _Inverse:
    """H = (G⁻¹ + Kp Kp')⁻¹ for growing Kp: G - Y'Y with Y (m, d_in) while m <= d_in, then as a (d_in, d_in) matrix."""

    def __init__(self, metric: SolveMetric, prior: Tensor) -> None:
        self.metric = metric
        self.factors: list[Tensor] = []
        self.dense: Tensor | None = None
        d_in, m = prior.shape
        if m > d_in:
            one = torch.eye(d_in, dtype=prior.dtype, device=prior.device)
            self.dense = torch.linalg.solve(one + metric(prior @ prior.T), metric(one))  # (d_in, d_in)
        elif m:
            self.extend(prior)

    def __call__(self, columns: Tensor) -> Tensor:
        """H @ columns, (d_in, n)."""
        if self.dense is not None:
            dense: Tensor = self.dense @ columns
            return dense
        found = self.metric(columns)
        for factor in self.factors:
            found = found - factor.T @ (factor @ columns)
        return found

    def extend(self, keys: Tensor) -> None:
        """Add keys (d_in, n): H loses HK(I + K'HK)⁻¹K'H, which has a Cholesky factor of rank n."""
        weighted = self(keys)  # (d_in, n)
        gram = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ weighted  # (n, n)
        added = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), weighted.T, upper=False)  # (n, d_in)
        if self.dense is not None:
            self.dense -= added.T @ added
            return
        self.factors = _joined([*self.factors, added], 0)
        d_in = keys.shape[0]
        if sum(len(factor) for factor in self.factors) > d_in:
            one = torch.eye(d_in, dtype=keys.dtype, device=keys.device)
            self.dense, self.factors = self(one), []


def _joined(pieces: list[Tensor], dim: int) -> list[Tensor]:
    """The pieces, the last ones concatenated until each is longer than the next: few pieces, cheap to append to."""
    while len(pieces) > 1 and pieces[-2].shape[dim] <= pieces[-1].shape[dim]:
        pieces = [*pieces[:-2], torch.cat(pieces[-2:], dim)]
    return pieces


def preserving_solve(residual: Tensor, keys: Tensor, prior: PriorKeys, metric: SolveMetric) -> Delta:
    """Minimizer of ‖ΔK - R‖² + ‖ΔKp‖² + tr(Δ G⁻¹ Δ'): Δ = [R, 0](I + E'GE)⁻¹E'G with E = [K, Kp].

    With H = (G⁻¹ + KpKp')⁻¹ that is R(I + K'HK)⁻¹K'H, an n x n system whatever came before; where a batch has more
    keys than d_in, the equivalent d_in x d_in system is the smaller one and is solved instead.

    Args:
        residual: R, (d_out, n).
        keys: K, (d_in, n).
        prior: Kp, (d_in, m), possibly with m = 0.
        metric: G.

    Returns:
        Delta with left = R (d_out, n), right (n, d_in).
    """
    inverse = prior.inverse(metric)
    weighted = inverse(keys)  # HK (d_in, n)
    d_in, n = keys.shape
    if n <= d_in:
        system = torch.eye(n, dtype=keys.dtype, device=keys.device) + keys.T @ weighted  # (n, n)
        return Delta(residual, torch.linalg.solve(system, weighted.T))
    system = torch.eye(d_in, dtype=keys.dtype, device=keys.device) + inverse(keys @ keys.T)  # (d_in, d_in)
    return Delta(residual, torch.linalg.solve(system, weighted).T)
