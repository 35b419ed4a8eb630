"""Deltas on a live model: a forward hook adds left @ (right @ x) to a module's output; the weight stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from patchkit.arch import Architecture
from patchkit.linalg import Delta


class LiveDelta:
    """A delta that one module adds to its output while attached. It may grow: `add` stacks another one on it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parts: list[Delta] = []
        self._factors: tuple[Tensor, Tensor | None] | None = None

    def add(self, delta: Delta) -> None:
        """Add `delta` to what the module writes from now on."""
        weight = next(self._module.parameters())
        self._parts = [Delta.stack([*self._parts, delta.to(device=weight.device)])]
        total = self._parts[0]
        d_out, d_in = total.left.shape[0], total.right.shape[1]
        if total.rank * (d_out + d_in) < d_out * d_in:
            self._factors = (total.right.T.to(weight.dtype), total.left.T.to(weight.dtype))
        else:  # beyond this rank the factors are larger than the matrix
            self._factors = (total.dense().T.to(weight.dtype), None)

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the module."""
        if self._factors is None:
            return output
        first, second = self._factors
        change = args[0] @ first  # (..., r) or (..., d_out)
        return output + (change if second is None else change @ second)


@contextmanager
def live_deltas(arch: Architecture, layers: Mapping[int, Delta | None]) -> Iterator[dict[int, LiveDelta]]:
    """Attach a `LiveDelta` at each layer in `layers`, starting from the given delta; all are gone afterwards."""
    live: dict[int, LiveDelta] = {}
    handles = []
    try:
        for layer, delta in layers.items():
            module = arch.sites[layer].module
            live[layer] = LiveDelta(module)
            if delta is not None:
                live[layer].add(delta)
            handles.append(module.register_forward_hook(live[layer].hook, prepend=True))
        yield live
    finally:
        for handle in handles:
            handle.remove()
