"""The routed experts of a layer as one wide matrix, whatever modules their weights are in.

What is asked here of them has two answers: `patchkit.model.stacked_experts`, where one module has all of their weights
in stacks, and `patchkit.model.separate_experts`, where each expert is a module of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a call of the module."""


@dataclass(frozen=True)
class Pairs:
    """Tokens with the experts they chose, (P,) each: the number of the token, of the row of the module's output that
    the pair adds to, of the expert, and its gate; hidden (P, hidden), what the expert reads."""

    hidden: Tensor
    token: Tensor
    row: Tensor
    expert: Tensor
    gate: Tensor

    def where(self, wanted: Tensor) -> Pairs:
        """Those at which `wanted` (P,) is true."""
        at = wanted.nonzero().squeeze(1)
        return Pairs(*(each[at] for each in (self.hidden, self.token, self.row, self.expert, self.gate)))

    def of_experts(self, wanted: Tensor) -> Pairs:
        """Those of the experts at which `wanted` (E,) is true."""
        return self.where(wanted.to(self.expert.device)[self.expert])


@dataclass(frozen=True)
class Experts(ABC):
    """E experts with output projections W_e (d_out, width).

    Side by side they are one matrix W = [W_1 ... W_E] (d_out, E·width), and a token's key is x = [g_1 k_1, ...], which
    is zero for the experts that it did not choose: the experts together put out W x (and their biases, gated).

    Attributes:
        name, module: of the module that is called with tokens and puts out what their experts make of them.
    """

    name: str
    module: nn.Module
    count: int
    width: int
    d_out: int

    @property
    @abstractmethod
    def weight_name(self) -> str:
        """What W is called; where it is one parameter, as that is in the state dict."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are stored."""
        return self.stored(0).dtype

    @abstractmethod
    def stored(self, expert: int) -> Tensor:
        """One expert's weight as it is stored, a view."""

    @abstractmethod
    def oriented(self, tensor: Tensor) -> Tensor:
        """Weights as they are stored as (..., d_out, width), and the other way round."""

    def side_by_side(self) -> Tensor:
        """W (d_out, E·width), a copy in the stored dtype."""
        return torch.cat([self.oriented(self.stored(expert)) for expert in range(self.count)], 1)

    def write(self, weight: Tensor) -> None:
        """Overwrite W (d_out, E·width) in place."""
        for expert, part in enumerate(weight.unflatten(1, (self.count, -1)).unbind(1)):
            self.oriented(self.stored(expert)).copy_(part)

    # --- calls --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def tokens(self, call: Call) -> int:
        """How many tokens a call is about."""

    @abstractmethod
    def pairs(self, call: Call) -> Pairs:
        """Which tokens went to which experts in a call, those that an expert ignores left out."""

    @abstractmethod
    def ask(self, call: Call, hidden: Tensor, expert: Tensor) -> Tensor:
        """Keys (P, width) of experts (P,) that read `hidden` (P, hidden): what their output projections multiply.

        `call` is one as the model makes it, of which the order of arguments is taken.
        """

    @abstractmethod
    def summed(self, call: Call, output: Any) -> Tensor:
        """What the module put out for each token, (tokens, d_out)."""

    @abstractmethod
    def plus(self, call: Call, output: Any, change: Tensor) -> Any:
        """The module's output with `change` (tokens, d_out) added to what it put out for each token."""


def explained(experts: Experts, call: Call, bare: Tensor) -> float:
    """How far W x is from what the experts put out for a call, (tokens, d_out) without biases and whatever else the
    module adds, as a share of it."""
    pairs = experts.pairs(call)
    keys = pairs.gate.unsqueeze(1) * experts.ask(call, pairs.hidden, pairs.expert)
    made = torch.zeros_like(bare)
    for expert in pairs.expert.unique().tolist():
        at = (pairs.expert == expert).nonzero().squeeze(1)
        made = made.index_add(0, pairs.token[at], (keys[at] @ experts.oriented(experts.stored(expert)).T).to(made))
    return float((made - bare).float().norm() / bare.float().norm())


def tolerance(dtype: torch.dtype) -> float:
    """What `explained` may be."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)
