"""Linear algebra of the editing methods: tensors in, tensors out, on whatever device and dtype they come.

Orientation throughout: a weight W is (d_out, d_in); keys K (d_in, n) and residuals R (d_out, n) are columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Covariance:
    """C = E[k k'] over the tokens of plain text, uncentred, (d_in, d_in), with the factorisations methods ask for.

    Its scale is fixed once: a mean over tokens, so a multiple λ·C weighs like λ tokens of text.
    """

    matrix: Tensor
    tokens: int

    @cached_property
    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d_in,) ascending, clipped at 0, and eigenvectors (d_in, d_in) as columns."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp_min(0), vectors

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

    def project_null(self, columns: Tensor, energy: float) -> Tensor:
        """P @ columns with P the projector of AlphaEdit eq. 9, never formed: the thinner of the basis and its rest."""
        rank, (_, vectors) = self.null_rank(energy), self.eigh
        if rank <= vectors.shape[0] // 2:
            basis = vectors[:, :rank]  # (d_in, rank)
            return basis @ (basis.T @ columns)  # (d_in, n)
        rest = vectors[:, rank:]  # (d_in, d_in - rank)
        return columns - rest @ (rest.T @ columns)  # (d_in, n)


def preserving_solve(
    residual: Tensor, keys: Tensor, prior: Tensor, inverse_metric: Callable[[Tensor], Tensor]
) -> Delta:
    """Minimiser of ‖ΔK - R‖² + ‖ΔKp‖² + tr(Δ G⁻¹ Δ'): Δ = [R, 0](I + E'GE)⁻¹E'G with E = [K, Kp].

    The push-through identity turns the d_in x d_in normal equations into an (n+m) x (n+m) solve. G is symmetric and
    given as a function that applies it: (λC)⁻¹ for MEMIT, P/l2 for AlphaEdit. Where earlier keys outnumber d_in, the
    equivalent d_in x d_in system is the smaller one and is solved instead.

    Args:
        residual: R, (d_out, n).
        keys: K, (d_in, n).
        prior: Kp, (d_in, m), possibly with m = 0.
        inverse_metric: columns (d_in, q) -> G @ columns (d_in, q).

    Returns:
        Delta with left = R (d_out, n), right (n, d_in).
    """
    n, d_in = keys.shape[1], keys.shape[0]
    if n + prior.shape[1] <= d_in:
        stacked = torch.cat([keys, prior], 1)  # (d_in, n+m)
        weighted = inverse_metric(stacked)  # (d_in, n+m)
        gram = stacked.T @ weighted  # (n+m, n+m)
        gram = gram + torch.eye(n + prior.shape[1], dtype=keys.dtype, device=keys.device)
        right = torch.linalg.solve(gram, weighted.T)[:n]  # (n, d_in)
    else:
        # K'G(I + EE'G)⁻¹, transposed: (I + G EE')⁻¹ G K.
        energy = keys @ keys.T + prior @ prior.T  # (d_in, d_in)
        system = torch.eye(d_in, dtype=keys.dtype, device=keys.device) + inverse_metric(energy)  # (d_in, d_in)
        right = torch.linalg.solve(system, inverse_metric(keys)).T  # (n, d_in)
    return Delta(residual, right)
