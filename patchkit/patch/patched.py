"""One module of a live model with the updates of patches on it, by a hook or written into its weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchkit.errors import InputError
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Update, delta_of, moved
from patchkit.model.devices import solve_device
from patchkit.model.hooks import LiveDelta
from patchkit.model.weights import is_quantized, loaded_weight, oriented, shape_of, weight_of


class PatchedModule:
    """A module with the updates of the active patches on it, by a hook or written into its weight."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._live = LiveDelta()
        self._handle: RemovableHandle | None = None
        self._original: Tensor | None = None

    @property
    def hooked(self) -> bool:
        return self._handle is not None

    def show(self, updates: Sequence[Update], merged: bool) -> None:
        """Put just `updates` on the module, in their order; with `merged`, into its weight."""
        self._restore()
        where = solve_device(self.module)
        total = delta_of([moved(update, where) for update in updates], self._rotatable) if updates else None
        self._live.set([total] if total is not None and not merged else [])
        if self._handle is None:
            # First, so that the user's own hooks see the patched output.
            self._handle = self.module.register_forward_hook(self._live.hook, prepend=True)
        if merged and total is not None:
            self._write(total)

    def release(self) -> None:
        """Leave the module as it was found."""
        self._restore()
        if self._handle is not None:
            self._handle.remove()

    def keep(self) -> None:
        """Make what was written permanent: forget the original weight."""
        self._original = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(d_out, d_in) of the weight, None if the module is no linear layer."""
        return shape_of(self.module)

    @property
    def described(self) -> str:
        """Shape or kind of the module, for error messages."""
        return f"{self.shape[0]} x {self.shape[1]}" if self.shape else f"a {type(self.module).__name__}"

    def check_writable(self) -> None:
        """Raises InputError where nothing can be written into the weight."""
        if is_quantized(self.module) or weight_of(self.module).is_meta:
            why = "quantized" if is_quantized(self.module) else "offloaded"
            raise InputError(f"{self.name}.weight: {why}, so that nothing can be merged into it; attach without merged")

    def base_weight(self) -> Tensor | None:
        """The weight without patches, as it is stored, also if offloaded; None if it is quantized."""
        return loaded_weight(self.module) if self._original is None else self._original

    @torch.no_grad()
    def _rotatable(self) -> Tensor:
        """W (d_out, d_in) without patches, in float32; of a quantized module, what it multiplies with."""
        weight = self.base_weight()
        if weight is not None:
            return oriented(self.module, weight).float()
        shape = shape_of(self.module)
        assert shape is not None
        eye = torch.eye(shape[1], device=next(self.module.buffers(), torch.empty(0)).device)  # (d_in, d_in)
        self._live.set([])
        output = self.module(torch.cat([eye, 0 * eye[:1]]))  # (d_in + 1, d_out), the last row being the bias
        assert isinstance(output, Tensor)
        return (output[:-1] - output[-1:]).T.float()

    @torch.no_grad()
    def _write(self, total: Delta) -> None:
        weight = weight_of(self.module)
        self._original = weight.detach().to("cpu", copy=True)
        change = oriented(self.module, total.to(device=weight.device).dense())  # as the weight lies
        weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + change)

    @torch.no_grad()
    def _restore(self) -> None:
        if self._original is not None:
            weight_of(self.module).copy_(self._original)
            self._original = None
