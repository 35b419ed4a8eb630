"""A model's linear layers computed by `patchkit.maths.onednn` for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from patchkit.maths.onednn import available, linear
from patchkit.model.threads import forward_in_this_thread
from patchkit.model.weights import LINEAR, is_transposed


class Linears:
    """The linear layers of `model` whose forward is torch's own; what wraps or quantizes one is left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._plain = [module for module in model.modules() if type(module) in LINEAR]
        self._nested = False

    @contextmanager
    def by_onednn(self) -> Iterator[None]:
        """Within the block they are computed by `linear`."""
        chosen = [] if self._nested or not available() else [m for m in self._plain if "forward" not in m.__dict__]
        nested, self._nested = self._nested, True
        try:
            for module in chosen:
                by_onednn = partial(_transposed if is_transposed(module) else _forward, module)
                module.forward = forward_in_this_thread(module, by_onednn)
            yield
        finally:
            self._nested = nested
            for module in chosen:
                del module.forward


def _forward(module: Any, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


def _transposed(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight.T, module.bias)
