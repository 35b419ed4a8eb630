"""What a site multiplies its weight with, token by token, as passes of the model show it.

Of a linear layer that is its input. Of experts side by side it is a token's keys times their gates, one block for each
expert, nearly all of them zero: blocks are made for the tokens that are asked about, never for a whole pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from patchkit.model.devices import at
from patchkit.model.experts import Call, Experts, Pairs
from patchkit.model.threads import in_this_thread
from patchkit.model.weights import Site


class SiteInput(ABC):
    """The input of a site in one pass over (rows, seq) tokens."""

    @abstractmethod
    def at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Keys (n, d_in) at some tokens, by the numbers (n,) of their rows and their positions there."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """By block, in which of them a weight has a part: its number, the keys (m, width) of the tokens that have
        anything there, and the numbers (m,) of those tokens, counted row by row."""

    def through(self, weight: Tensor) -> Tensor:
        """W x at every token, (rows, seq, d_out), for another weight (d_out, d_in)."""
        found: Tensor | None = None
        for block, keys, token in self.blocks():
            part = linear(keys.to(weight), weight[:, block * keys.shape[1] : (block + 1) * keys.shape[1]])
            found = weight.new_zeros(self.tokens, len(weight)) if found is None else found
            found = found.index_add(0, token, part)
        assert found is not None
        by_row: Tensor = found.unflatten(0, (self.rows, -1))
        return by_row

    def against(self, gradient: Tensor) -> Tensor:
        """Σ g x' over all tokens, (d_out, d_in), for g (rows, seq, d_out)."""
        flat = gradient.flatten(0, 1)
        found = flat.new_zeros(flat.shape[1], self.d_in)
        for block, keys, token in self.blocks():
            found[:, block * keys.shape[1] : (block + 1) * keys.shape[1]] += flat[token].T @ keys.to(flat)
        return found

    rows: int
    tokens: int
    d_in: int


@dataclass
class LinearInput(SiteInput):
    """Of a linear layer: keys (rows, seq, d_in)."""

    keys: Tensor

    def __post_init__(self) -> None:
        self.rows, self.tokens, self.d_in = len(self.keys), self.keys[..., 0].numel(), self.keys.shape[-1]

    def at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """See `SiteInput`."""
        return at(self.keys, rows, positions)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See `SiteInput`."""
        yield 0, self.keys.flatten(0, 1), torch.arange(self.tokens, device=self.keys.device)

    def through(self, weight: Tensor) -> Tensor:
        """See `SiteInput`."""
        return linear(self.keys.to(weight), weight)

    def against(self, gradient: Tensor) -> Tensor:
        """See `SiteInput`."""
        return gradient.flatten(0, 1).T @ self.keys.to(gradient).flatten(0, 1)


@dataclass
class ExpertsInput(SiteInput):
    """Of experts side by side, from one call of their module."""

    experts: Experts
    call: Call
    rows: int

    def __post_init__(self) -> None:
        self.tokens = self.experts.tokens(self.call)
        self.d_in = self.experts.count * self.experts.width

    @cached_property
    def pairs(self) -> Pairs:
        """The tokens with the experts they chose."""
        return self.experts.pairs(self.call)

    def keys(self, pairs: Pairs) -> Tensor:
        """g k of some pairs, (P, width)."""
        return pairs.gate.unsqueeze(1) * self.experts.ask(self.call, pairs.hidden, pairs.expert)

    def at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """See `SiteInput`."""
        device = self.pairs.token.device
        wanted = rows.to(device) * (self.tokens // self.rows) + positions.to(device)
        tokens, place = wanted.unique(return_inverse=True)
        number = torch.full((self.tokens,), -1, device=device).index_copy(
            0, tokens, torch.arange(len(tokens), device=device)
        )
        pairs = self.pairs.where(number[self.pairs.token] >= 0)
        keys = self.keys(pairs)
        found = keys.new_zeros(len(tokens), self.experts.count, self.experts.width)
        return found.index_put((number[pairs.token], pairs.expert), keys).flatten(1)[place]

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See `SiteInput`."""
        for expert in range(self.experts.count):
            pairs = self.pairs.where(self.pairs.expert == expert)
            if len(pairs.token):
                yield expert, self.keys(pairs), pairs.token


See = Callable[[SiteInput, Tensor], "Tensor | None"]


@contextmanager
def watching_site(site: Site, rows: int, see: See) -> Iterator[None]:
    """Call `see(input, output)` whenever the site's module runs, in this thread, in a pass over `rows` rows; the output
    is (rows, seq, d_out), and a tensor like it that is returned is added to it."""

    def of_linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        keys = args[0].view(rows, -1, args[0].shape[-1])  # some families flatten (rows, seq) before a module (OPT)
        added = see(LinearInput(keys), output.view(rows, -1, output.shape[-1]))
        return None if added is None else output + added.view_as(output)

    def of_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        assert site.experts is not None
        call = args, kwargs
        together = site.experts.summed(call, output).view(rows, -1, site.d_out)
        added = see(ExpertsInput(site.experts, call, rows), together)
        return None if added is None else site.experts.plus(call, output, added.flatten(0, 1))

    hook = of_experts if site.experts else of_linear
    handle = site.module.register_forward_hook(in_this_thread(hook), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
