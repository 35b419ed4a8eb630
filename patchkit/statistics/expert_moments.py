"""Second moments of the keys of a layer's experts, as they are stored: each expert's, with all of its eigenvectors.

An expert is narrow, so that these cost little; there are many of them, so that they are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.statistics.store import Tensors


def of_experts(mean: Tensor, tokens: float) -> Tensors:
    """What is stored of experts' second moments, from those (E, width + 1, width + 1) of keys with a 1 at their end,
    which counts tokens; `few` (E,) says for which of them the text has less tokens than their keys have entries.

    What those lack are so many tokens of the layer's mean expert, so that no direction is taken for one that text never
    uses; as a whole they have the weight of the tokens that they did get, or of one.
    """
    counts, moments = tokens * mean[:, -1, -1], tokens * mean[:, :-1, :-1]  # (E,), sums over tokens
    width = moments.shape[1]
    few, pooled = counts < width, moments.sum(0) / counts.sum().clamp_min(1)
    missing = (width - counts).clamp_min(0).view(-1, 1, 1)
    filled = (moments + missing * pooled) / width * (counts.clamp_min(1) / tokens).view(-1, 1, 1)
    found = torch.where(few.view(-1, 1, 1), filled, moments / tokens)
    values, vectors = torch.linalg.eigh(found)
    return {
        "second_moment": found.float().contiguous(),
        "eigenvalues": values.clamp_min(0),
        "eigenvectors": vectors.float().contiguous(),
        "few": few.float(),
    }


def are_of_experts(stored: Tensors) -> bool:
    """Whether stored tensors are second moments with their factorization: of one size, finite, no eigenvalue below zero
    but for rounding, and as large in all as the diagonal is."""
    try:
        mean, values, vectors, few = (stored[n] for n in ("second_moment", "eigenvalues", "eigenvectors", "few"))
    except KeyError:
        return False
    blocks, size, _ = mean.shape
    if not size or not mean.shape == vectors.shape == (blocks, size, size):
        return False
    if values.shape != (blocks, size) or few.shape != (blocks,):
        return False
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (mean, values, vectors))
    total, largest = float(values.double().sum()), float(values.max())
    if not finite or largest <= 0 or float(values.min()) < -1e-3 * largest:
        return False
    lengths = vectors.double().square().sum(-2)
    trace = float(mean.double().diagonal(dim1=-2, dim2=-1).sum())
    return abs(total - trace) < 1e-3 * total and bool((lengths - 1).abs().max() < 1e-3)
