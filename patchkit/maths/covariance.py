"""Second moments C of plain text's keys, and what methods ask of them: solves, null spaces, products with a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from patchkit.maths.leading import Leading, leading, leading_of


class Kept(Protocol):
    """Where leading eigenvectors are kept from one run to the next."""

    def load(self, energy: float) -> Leading | None:
        """Those that hold all but `energy`, if they are there."""

    def save(self, energy: float, found: Leading) -> Leading:
        """Keep them; what a later `load` gives."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """C = E[k k'] over the tokens of plain text, uncentered, (d_in, d_in), with the factorizations methods ask for.

    It is a mean over tokens, weighted as `patchkit stats` does, so that λ·C weighs as much as λ tokens of text. Nothing
    is factored before a method asks for it, and then on the device where it lies: solves take a Cholesky factor, null
    spaces the leading eigenvectors alone.

    known_eigh: what `eigh` gives, where it has been computed before; everything is then taken from it.
    kept: leading eigenvectors from earlier runs.
    """

    matrix: Tensor
    tokens: int
    known_eigh: tuple[Tensor, Tensor] | None = None
    kept: Kept | None = None

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
        return self.known_eigh or self._decomposed()

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix.double())
        return values.clamp_min(0), vectors

    @cached_property
    def mean(self) -> float:
        """The mean eigenvalue."""
        if self.known_eigh is not None:
            return float(self.known_eigh[0].mean())
        return float(self.matrix.diagonal().double().mean())

    @cached_property
    def _cholesky(self) -> dict[float, Tensor | None]:
        return {}

    def _factor(self, floor: float) -> Tensor | None:
        """L of C + floor·I = LL', lower triangular; None where eigenvectors are known, or rounding has left C with
        eigenvalues below -floor."""
        if self.known_eigh is not None:
            return None
        if floor not in self._cholesky:
            damped = self.matrix.to(torch.float64, copy=True)
            damped.diagonal().add_(floor)
            factor, wrong = torch.linalg.cholesky_ex(damped)
            self._cholesky[floor] = None if wrong else factor
        return self._cholesky[floor]

    def typical(self, columns: Tensor, damping: float) -> Tensor:
        """E k' G k over the text's tokens, G as in `solve`, for each of some keys (d_in, n): (n,), all the same.

        That is tr(GC) = d_in - floor·tr(G).
        """
        floor = damping * self.mean
        factor = self._factor(floor)
        if factor is None:
            values, _ = self.eigh
            found = (values / (values + floor)).sum()
        else:
            found = len(factor) - floor * torch.cholesky_inverse(factor).diagonal().sum()
        return found.expand(columns.shape[1])

    def times(self, weight: Tensor) -> Tensor:
        """W C, (d_out, d_in)."""
        return weight @ self.matrix.to(weight)

    def solve(self, columns: Tensor, damping: float) -> Tensor:
        """(C + damping·mean(eigenvalues)·I)⁻¹ @ columns, (d_in, n).

        C is singular whenever there were fewer tokens than dimensions; the damping is relative, so that it means the
        same on every model.
        """
        return self.shifted_solve(columns, damping * self.mean)

    def shifted_solve(self, columns: Tensor, floor: float) -> Tensor:
        """(C + floor·I)⁻¹ @ columns, (d_in, n)."""
        factor = self._factor(floor)
        if factor is not None:
            return torch.cholesky_solve(columns, factor)
        values, vectors = self.eigh
        return vectors @ ((vectors.T @ columns) / (values + floor).unsqueeze(1))  # (d_in, n)

    @cached_property
    def _leading(self) -> dict[float, Leading]:
        return {}

    def leading(self, energy: float) -> Leading:
        """The fewest eigenvectors that hold all but at most `energy` of the text's key energy."""
        if energy not in self._leading:
            known = None if self.kept is None else self.kept.load(energy)
            self._leading[energy] = self._found(energy) if known is None else known.to(self.matrix.device)
        return self._leading[energy]

    def _found(self, energy: float) -> Leading:
        found = leading(self.matrix.double(), energy) if self.known_eigh is None else None
        if found is None:  # of all eigenvectors no more is held than is kept of them
            found = leading_of(*(self.known_eigh or self._decomposed()), energy)
        return found if self.kept is None else self.kept.save(energy, found).to(self.matrix.device)

    def null_rank(self, energy: float) -> int:
        """Dimensions of the largest trailing eigenspace that holds at most `energy` of the text's key energy.

        AlphaEdit's paper keeps the eigenvalues below an absolute number (1e-2), which means something else on every
        model and layer; a share of the trace bounds E‖P k‖² / E‖k‖² directly and has no unit.
        """
        return len(self.matrix) - len(self.leading(energy).values)

    def null_energy(self, energy: float) -> float:
        """E‖P k‖² over the text's tokens, P as in `project_null`."""
        return self.leading(energy).rest

    def project_null(self, columns: Tensor, energy: float) -> Tensor:
        """P @ columns with P = I - VV' the projector of AlphaEdit eq. 9, never formed."""
        vectors = self.leading(energy).vectors  # (d_in, q)
        if vectors.shape[1] == len(vectors):
            return torch.zeros_like(columns)
        return columns - vectors @ (vectors.T @ columns)  # (d_in, n)

    def silent_at(self, places: Tensor) -> Covariance:
        """What keys that are zero outside of `places`, indices of dimensions in which no token of the text has
        anything, see of C: those dimensions hold no energy and all others as much as they did, by themselves.

        How the others go together would only show in keys that have something there.
        """
        energy = self.matrix.diagonal().to(torch.float64, copy=True)
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
        found: Tensor = (parts @ self.matrix.to(weight)).transpose(0, 1).flatten(1)
        return found

    @cached_property
    def mean(self) -> float:
        """The mean eigenvalue of all blocks."""
        return float(self.eigh[0].mean())

    def shifted_solve(self, columns: Tensor, floor: float) -> Tensor:
        """As that of the block-diagonal matrix (d_in, d_in): (d_in, n)."""
        values, vectors = self.eigh
        within = vectors.mT @ self._blocks(columns)  # (blocks, width, n)
        return (vectors @ (within / (values + floor).unsqueeze(2))).flatten(0, 1)

    def typical(self, columns: Tensor, damping: float) -> Tensor:
        """For each key over those blocks in which it has anything, (n,): tokens in others do not meet it."""
        values, _ = self.eigh
        of_block = (values / (values + damping * values.mean())).sum(1)  # (blocks,)
        there = self._blocks(columns).any(1)  # (blocks, n)
        found: Tensor = there.to(of_block).T @ of_block
        return found

    def leading(self, energy: float) -> Leading:
        """Not of all blocks together: each has its own."""
        raise NotImplementedError

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
