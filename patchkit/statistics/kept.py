"""Leading eigenvectors of second moments, kept in a `StatisticsStore` beside what they were computed of."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from patchkit.maths.leading import Leading
from patchkit.ranks import world
from patchkit.statistics.store import Origin, StatisticsStore, Tensors

WORTH_KEEPING = 256
"""Smaller ones are computed again in less time than it takes to read them."""


@dataclass(frozen=True)
class KeptLeading:
    """Those of one site's second moments.

    origin: of the second moments.
    """

    store: StatisticsStore
    origin: Origin

    def load(self, energy: float) -> Leading | None:
        """Those that hold all but `energy`, if they are there and sound."""
        origin = self._origin(energy)
        found = self.store.load(origin, are_leading) if self.store.has(origin) else None
        return None if found is None else _leading(found)

    def has(self, energy: float) -> bool:
        """Whether `load` would find them; they are not read."""
        return self.store.has(self._origin(energy))

    def save(self, energy: float, found: Leading) -> Leading:
        """Keep them, where the folder can be written to; gives what `load` will give, which is rounded."""
        tensors = {
            "values": found.values.double().cpu().contiguous(),
            "vectors": found.vectors.float().cpu().contiguous(),
            "rest_and_error": torch.tensor([found.rest, found.error], dtype=torch.float64),
        }
        if world().first and len(found.vectors) >= WORTH_KEEPING:
            with suppress(OSError):  # it is computed again the next time
                self.store.save(self._origin(energy), tensors)
        return _leading(tensors)

    def _origin(self, energy: float) -> Origin:
        about = f"{self.origin.model}, all but {energy}"
        return self.origin.model_copy(update={"kind": "leading_eigenvectors", "model": about})


def _leading(stored: Tensors) -> Leading:
    rest, error = stored["rest_and_error"].tolist()
    return Leading(stored["values"], stored["vectors"].double(), rest, error)


def are_leading(stored: Tensors) -> bool:
    """Whether stored tensors are eigenvalues, one for each vector and none below zero, and vectors of length 1."""
    values, vectors, numbers = (stored.get(name) for name in ("values", "vectors", "rest_and_error"))
    if values is None or vectors is None or numbers is None or numbers.shape != (2,):
        return False
    if vectors.ndim != 2 or values.shape != vectors.shape[1:]:
        return False
    finite = all(bool(torch.isfinite(each).all()) for each in (values, vectors, numbers))
    lengths = vectors.double().square().sum(0)
    return finite and bool((values >= 0).all() and (numbers >= 0).all() and ((lengths - 1).abs() < 1e-3).all())
