"""Low-rank deltas on a live model: forward hooks add left @ (right @ x) to a module's output; no weight is written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from patchkit.maths.linalg import Delta
from patchkit.model.arch import Architecture
from patchkit.model.separate_experts import SeparateExperts
from patchkit.model.stacked_experts import StackedExperts
from patchkit.model.threads import in_this_thread
from patchkit.model.weights import Site

Name = TypeVar("Name", bound=Hashable)


class LiveDelta:
    """The sum of the deltas on one module, applied as a single product.

    Once the factors together are larger than the (d_out, d_in) matrix, the matrix is kept instead, so that adding a
    delta does not get slower with their number.
    """

    def __init__(self) -> None:
        self._parts: list[Delta] = []
        self._matrix: Tensor | None = None
        self._factors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, delta: Delta) -> LiveDelta:
        """Of a single delta."""
        live = cls()
        live.add(delta)
        return live

    def add(self, delta: Delta) -> None:
        """Add one more delta."""
        self._factors = ()
        self._parts.append(delta)
        d_out, d_in = delta.left.shape[0], delta.right.shape[1]
        if self._matrix is None and sum(part.rank for part in self._parts) * (d_out + d_in) < d_out * d_in:
            return
        for part in self._parts:
            dense = part.dense()
            self._matrix = dense if self._matrix is None else self._matrix.add_(dense.to(self._matrix))
        self._parts = []

    def set(self, deltas: Sequence[Delta]) -> None:
        """Replace all deltas; with none, the module's output is left as it is, bit for bit."""
        self._parts, self._matrix, self._factors = [], None, ()
        for delta in deltas:
            self.add(delta)

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of a linear layer."""
        if not self._parts and self._matrix is None:
            return output
        # A module that is quantized or offloaded may take its input on another device, or in another dtype.
        change = args[0].to(output)
        for factor in self._like(output):
            change = linear(change, factor)  # (..., r), then (..., d_out)
        return output + change

    def hook_of_experts(
        self, experts: StackedExperts, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Forward hook, with kwargs, of the module that has the experts whose weights side by side are changed."""
        if not self._parts and self._matrix is None:
            return output
        factors, call = self._like(output), (args, kwargs)
        first = factors[0].unflatten(1, (experts.count, -1)).transpose(0, 1)  # (E, r or d_out, width)
        changed = first.flatten(1).any(1)
        pairs = experts.pairs(call).of_experts(changed)
        if not len(pairs.token):
            return output
        keys = experts.ask(call, pairs.hidden, pairs.expert).to(output)
        change = keys.new_zeros(len(keys), len(factors[-1]))
        for expert in changed.nonzero().squeeze(1).tolist():
            at = (pairs.expert == expert).nonzero().squeeze(1)
            part = linear(keys[at], first[expert])
            for factor in factors[1:]:
                part = linear(part, factor)
            change = change.index_copy(0, at, part)
        return experts.add(output, pairs, change)

    def hook_of_expert(
        self, experts: SeparateExperts, expert: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Forward hook of the output projection of one of the experts whose weights side by side are changed."""
        if not self._parts and self._matrix is None:
            return output
        first, *rest = self._like(output)
        own = first[:, expert * experts.width : (expert + 1) * experts.width]  # (r or d_out, width)
        if not own.any():
            return output
        change = linear(args[0].to(output), own)
        for factor in rest:
            change = linear(change, factor)
        return output + change

    def _like(self, output: Tensor) -> tuple[Tensor, ...]:
        factors = self._factors  # looked at once: another thread may be running the model in another dtype
        if not factors or factors[0].dtype != output.dtype or factors[0].device != output.device:
            factors = self._factors = self._cast(output)
        return factors

    def _cast(self, output: Tensor) -> tuple[Tensor, ...]:
        # Made under inference_mode, they could not be used by a later call that computes gradients.
        with torch.inference_mode(False):
            if self._matrix is None:
                total = Delta.stack([part.to(self._parts[0].left) for part in self._parts])
                factors: tuple[Tensor, ...] = (total.right, total.left)
            else:
                factors = (self._matrix,)
            return tuple(factor.detach().to(output).contiguous() for factor in factors)


@contextmanager
def live_on(sites: Mapping[Name, tuple[Site, Sequence[Delta]]]) -> Iterator[dict[Name, LiveDelta]]:
    """Attach a `LiveDelta` at each site, under whatever name, starting from the given deltas; all are gone afterward.
    They act on this thread's passes."""
    live: dict[Name, LiveDelta] = {}
    with ExitStack() as stack:
        for name, (site, deltas) in sites.items():
            live[name] = LiveDelta()
            live[name].set(deltas)
            for module, hook, wide in _hooks(site, live[name]):
                handle = module.register_forward_hook(in_this_thread(hook), prepend=True, with_kwargs=wide)
                stack.callback(handle.remove)
        yield live


def _hooks(site: Site, live: LiveDelta) -> Iterator[tuple[nn.Module, Callable[..., Tensor], bool]]:
    """By which a delta acts at a site: modules, their hooks, and whether these are to have keyword arguments."""
    experts = site.experts
    if experts is None:
        yield site.module, live.hook, False
    elif isinstance(experts, SeparateExperts):
        for expert in range(experts.count):
            yield experts.linear(expert), partial(live.hook_of_expert, experts, expert), False
    else:
        assert isinstance(experts, StackedExperts)
        yield site.module, partial(live.hook_of_experts, experts), True


@contextmanager
def live_deltas(arch: Architecture, layers: Mapping[int, Delta | None]) -> Iterator[dict[int, LiveDelta]]:
    """The same at the sites of `layers`, by their numbers."""
    with live_on({n: (arch.sites[n], [] if delta is None else [delta]) for n, delta in layers.items()}) as live:
        yield live
