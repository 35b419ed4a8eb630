"""Linear algebra of the editing methods: tensors in, tensors out, on the device and in the dtype of the input.

Orientation throughout: a weight W is (d_out, d_in); keys K (d_in, n) and residuals R (d_out, n) are columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class Covariance:
    """C = E[k k'] over the tokens of plain text, uncentered, (d_in, d_in), with the factorizations methods ask for.

    It is a mean over tokens, weighted as `patchkit stats` does, so that λ·C weighs as much as λ tokens of text.

    known_eigh: what `eigh` gives, where it has been computed before.
    """

    matrix: Tensor
    tokens: int
    known_eigh: tuple[Tensor, Tensor] | None = None

    @cached_property
    def _copies(self) -> dict[torch.device, Covariance]:
        return {self.matrix.device: self}

    def on(self, device: torch.device) -> Covariance:
        """The same on `device`; it is moved there once, so that a metric of it stays the same metric."""
        if device not in self._copies:
            factors = self.known_eigh and (self.known_eigh[0].to(device), self.known_eigh[1].to(device))
            self._copies[device] = replace(self, matrix=self.matrix.to(device), known_eigh=factors)
        return self._copies[device]

    @cached_property
    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d_in,) ascending, clipped at 0, and eigenvectors (d_in, d_in) as columns."""
        if self.known_eigh is not None:
            return self.known_eigh
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp_min(0), vectors

    def typical(self, columns: Tensor, damping: float) -> Tensor:
        """E k' G k over the text's tokens, G as in `solve`, for each of some keys (d_in, n): (n,), all the same."""
        values, _ = self.eigh
        return (values / (values + damping * values.mean())).sum().expand(columns.shape[1])

    def times(self, weight: Tensor) -> Tensor:
        """W C, (d_out, d_in)."""
        return weight @ self.matrix

    def solve(self, columns: Tensor, damping: float) -> Tensor:
        """(C + damping·mean(eigenvalues)·I)⁻¹ @ columns, (d_in, n).

        C is singular whenever there were fewer tokens than dimensions; the damping is relative, so that it means the
        same on every model.
        """
        values, vectors = self.eigh
        floor = damping * values.mean()
        return vectors @ ((vectors.T @ columns) / (values + floor).unsqueeze(1))  # (d_in, n)

    def null_rank(self, energy: float) -> int:
        """Dimensions of the largest trailing eigenspace that holds at most `energy` of the text's key energy.

        AlphaEdit's paper keeps the eigenvalues below an absolute number (1e-2), which means something else on every
        model and layer; a share of the trace bounds E‖P k‖² / E‖k‖² directly and has no unit.
        """
        values, _ = self.eigh
        return int((values.cumsum(0) <= energy * values.sum()).sum())

    def null_energy(self, energy: float) -> float:
        """E‖P k‖² over the text's tokens, P as in `project_null`."""
        return float(self.eigh[0][: self.null_rank(energy)].sum())

    def project_null(self, columns: Tensor, energy: float) -> Tensor:
        """P @ columns with P the projector of AlphaEdit eq. 9, never formed: the thinner of the basis and its rest."""
        rank, (_, vectors) = self.null_rank(energy), self.eigh
        if rank <= vectors.shape[0] // 2:
            basis = vectors[:, :rank]  # (d_in, rank)
            return basis @ (basis.T @ columns)  # (d_in, n)
        rest = vectors[:, rank:]  # (d_in, d_in - rank)
        return columns - rest @ (rest.T @ columns)  # (d_in, n)

    def silent_at(self, places: Tensor) -> Covariance:
        """What keys that are zero outside of `places`, indices of dimensions in which no token of the text has
        anything, see of C: those dimensions hold no energy and all others as much as they did, by themselves.

        How the others go together would only show in keys that have something there.
        """
        energy = self.matrix.diagonal().clone()
        energy[places.to(energy.device)] = 0
        order = energy.argsort()
        vectors = torch.eye(len(energy), dtype=energy.dtype, device=energy.device)[:, order]
        return Covariance(energy.diag(), self.tokens, (energy[order], vectors))


@dataclass(frozen=True, eq=False)
class SideBySide(Covariance):
    """C of keys that are made of blocks, one for each of several weights side by side, as far as the blocks by
    themselves go: matrix (blocks, width, width), d_in = blocks·width, and nothing of size d_in² is made.

    For experts a block is the mean over all tokens of g² k k', zero where a token is not routed to it.

    few: the blocks of which the text says too little, which were filled up with the others' mean.
    """

    few: tuple[int, ...] = ()

    def block(self, number: int) -> Covariance:
        """One of them by itself."""
        values, vectors = self.eigh
        return Covariance(self.matrix[number], self.tokens, (values[number], vectors[number]))

    def times(self, weight: Tensor) -> Tensor:
        """W C, (d_out, d_in)."""
        parts = weight.unflatten(1, (len(self.matrix), -1)).transpose(0, 1)  # (blocks, d_out, width)
        found: Tensor = (parts @ self.matrix).transpose(0, 1).flatten(1)
        return found

    def solve(self, columns: Tensor, damping: float) -> Tensor:
        """As that of the block-diagonal matrix (d_in, d_in): (d_in, n)."""
        values, vectors = self.eigh
        within = vectors.mT @ self._blocks(columns)  # (blocks, width, n)
        return (vectors @ (within / (values + damping * values.mean()).unsqueeze(2))).flatten(0, 1)

    def typical(self, columns: Tensor, damping: float) -> Tensor:
        """For each key over those blocks in which it has anything, (n,): tokens in others do not meet it."""
        values, _ = self.eigh
        of_block = (values / (values + damping * values.mean())).sum(1)  # (blocks,)
        there = self._blocks(columns).any(1)  # (blocks, n)
        found: Tensor = there.to(of_block).T @ of_block
        return found

    def null_rank(self, energy: float) -> int:
        """Of all blocks together."""
        return int(self._null(energy).sum())

    def null_energy(self, energy: float) -> float:
        """E‖P x‖² over the text's tokens."""
        return float((self.eigh[0] * self._null(energy)).sum())

    def project_null(self, columns: Tensor, energy: float) -> Tensor:
        """P @ columns (d_in, n), each block's own null space holding at most `energy` of its own energy: however seldom
        a token is routed there, what it finds is as it was."""
        _, vectors = self.eigh
        within = (vectors.mT @ self._blocks(columns)) * self._null(energy).unsqueeze(2)
        return (vectors @ within).flatten(0, 1)

    def silent_at(self, places: Tensor) -> Covariance:
        """Not of blocks: neurons are rewritten in ordinary feed-forward layers only."""
        raise NotImplementedError

    def _null(self, energy: float) -> Tensor:
        """Which eigenvectors (blocks, width) are in the null space."""
        values, _ = self.eigh
        return values.cumsum(1) <= energy * values.sum(1, keepdim=True)

    def _blocks(self, columns: Tensor) -> Tensor:
        found: Tensor = columns.unflatten(0, (len(self.matrix), -1))  # (blocks, width, n)
        return found


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
        rank, (values, vectors) = self.covariance.null_rank(self.energy), self.covariance.eigh
        basis = vectors[:, :rank]  # (d_in, rank)
        return basis @ ((basis.T @ columns) / (self.weight * values[:rank] + self.l2).unsqueeze(1))


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
