"""A model's linear layers computed by `patchkit.maths.onednn` for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchkit.maths.onednn import available, fast_in_16_bits, fits, linear, rounded_linear
from patchkit.model.threads import forward_in_this_thread
from patchkit.model.weights import LINEAR, is_transposed


class Linears:
    """The linear layers of `model` whose forward is torch's own; what wraps or quantizes one is left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._plain = [module for module in model.modules() if type(module) in LINEAR]
        self._nested = False
        self._rounded: dict[nn.Module, Tensor] | None = None
        self._head: nn.Module | None = None

    @contextmanager
    def in_16_bits(self, head: nn.Module, weights: dict[nn.Module, Tensor]) -> Iterator[None]:
        """Within the block products in float32 are those of factors in bfloat16, where the processor is fast at them,
        but for those of `head`, whose logits differ by less than bfloat16 has room for. The weights that are used are
        put into `weights` in bfloat16, and taken from there."""
        before, self._head = self._rounded, head
        self._rounded = weights if fast_in_16_bits() else None
        try:
            yield
        finally:
            self._rounded = before

    @contextmanager
    def by_onednn(self) -> Iterator[None]:
        """Within the block they are computed by `linear`."""
        chosen = [] if self._nested or not available() else [m for m in self._plain if "forward" not in m.__dict__]
        nested, self._nested = self._nested, True
        try:
            for module in chosen:
                by_onednn = partial(self._forward, module)
                module.forward = forward_in_this_thread(module, by_onednn)
            yield
        finally:
            self._nested = nested
            for module in chosen:
                del module.forward

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        weight = module.weight.T if is_transposed(module) else module.weight
        if self._rounded is not None and module is not self._head and fits(x, weight):
            if module not in self._rounded:
                self._rounded[module] = weight.detach().to(torch.bfloat16)
            return rounded_linear(x, self._rounded[module], module.bias)
        return linear(x, weight, module.bias)
