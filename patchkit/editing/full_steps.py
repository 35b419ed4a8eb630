"""Steps scaled by the second moment of the whole gradient, where Adam's are by that of each of its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.model.devices import sent

DAMPING = 0.01
"""What is added to the square root of the second moment, in units of the root of its trace."""


class FullSteps:
    """Adaptive steps with a full matrix: w = (C^½ + ε I)⁻¹ m, with m the mean of a fact's gradients that momentum has,
    and C their second moment (GGT, Agarwal et al. 2018, arXiv 1806.02958, algorithm 1; full-matrix AdaGrad, Duchi et
    al. 2011). A fact takes a few dozen steps, so that C has a rank of as many and is never made: all of it happens
    among the gradients' products with each other, on the host, which waits for the device once a step in any case.

    What the gradient of rows that take turns has in common with the last ones is soon known, and is not what C shortens
    most, as it is where each number is divided by its own size. ε is for what few gradients say: GGT's of 1e-4 and an
    absolute one; here it goes with the gradients' size.

    Shapes, of k active facts: past (k, places, steps, d), their gradients; products (k, places, steps, steps), on the
    host in float64.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor, momentum: float, memory: float) -> None:
        self.past = like.new_zeros(0, *shape)
        self.products = torch.zeros(0, *shape[:2], shape[1], dtype=torch.float64)
        self.momentum, self.memory = momentum, memory

    def admit(self, facts: int) -> None:
        """Room for more facts, after the others."""
        self.past, self.products = (
            torch.cat([each, each.new_zeros(facts, *each.shape[1:])]) for each in (self.past, self.products)
        )

    def retire(self, going: Sequence[int]) -> None:
        """Go on with the facts at these places alone."""
        self.past = self.past[sent(going, self.past.device, torch.long)]
        self.products = self.products[torch.tensor(going, dtype=torch.long)]

    def meet(self, gradient: Tensor, counts: Sequence[int]) -> Tensor:
        """Remember each fact's gradient (k, places, d) as the one after `counts` (k,) others, and give its products
        with all of them (k, places, steps)."""
        last = self.past.shape[2] - 1
        at = sent([min(count, last) for count in counts], gradient.device)
        self.past[torch.arange(len(at), device=at.device), :, at] = gradient
        return (self.past @ gradient.unsqueeze(-1)).squeeze(-1)

    def step(self, products: Tensor, counts: Sequence[int]) -> Tensor:
        """The step (k, places, d), to be taken downhill and at most 1 long, after `meet` gave `products`, which are on
        the host by now; `counts` are the same."""
        shares = torch.zeros(products.shape, dtype=torch.float64)
        for count in set(counts):
            facts, n = [i for i, each in enumerate(counts) if each == count], count + 1
            self.products[facts, :, count] = self.products[facts, :, :, count] = products[facts].double()
            shares[facts, :, :n] = self._shares(self.products[facts, :, :n, :n])
        there = sent(shares.to(self.past.dtype), self.past.device)
        return (there.unsqueeze(2) @ self.past).squeeze(2)

    def _shares(self, products: Tensor) -> Tensor:
        """Which share (k, places, n) each of n gradients has in the step, by their products (k, places, n, n). With
        G (n, d) their rows, D their weights and a that of each in m = Gᵀa, C = GᵀDG, and the step is Gᵀ times
        D^½ (K^½ + ε I)⁻¹ D^-½ a with K = D^½ G Gᵀ D^½."""
        age = torch.arange(products.shape[-1] - 1, -1, -1, dtype=torch.float64)
        weight, mean = (decay**age / (decay**age).sum() for decay in (self.memory, self.momentum))
        root = weight.sqrt()
        size, vectors = torch.linalg.eigh(root.unsqueeze(1) * products * root)
        size = size.clamp_min(0)
        scale = size.sqrt() + DAMPING * size.sum(-1, keepdim=True).sqrt() + torch.finfo(torch.float32).tiny
        inside = (vectors.mT @ (mean / root).unsqueeze(-1)).squeeze(-1) / scale
        shares = root * (vectors @ inside.unsqueeze(-1)).squeeze(-1)
        length = (shares.unsqueeze(-2) @ products @ shares.unsqueeze(-1)).squeeze(-1).clamp_min(0).sqrt()
        bounded: Tensor = shares / length.clamp_min(1)
        return bounded
