"""One module of a live model with the updates of patches on it, by a hook or written into its weight."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.maths.blocks import InBlock, in_blocks, joined
from patchkit.maths.folding import PLAIN
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain, Update, delta_of, moved
from patchkit.model.devices import solve_device
from patchkit.model.digests import tensor_digest
from patchkit.model.hooks import LiveDelta
from patchkit.model.stacked_experts import StackedExperts
from patchkit.model.weights import is_quantized, loaded_weight, oriented, shape_of, weight_of
from patchkit.patch.passes import NOTHING, Passes, remove_hook
from patchkit.patch.patch import Patch
from patchkit.patch.unfolded import folding_at_full_precision, folding_of, unfolded
from patchkit.words import agreeing

Placed = tuple[Update | InBlock, ...]
"""Updates of a module's weight, in the order in which they act; of experts, each of one of them."""


class PatchedModule:
    """A module with the updates of the active patches on it, by a hook or written into its weight.

    Its hook adds what `passes` says that the pass in its thread sees under the module's name.
    """

    wants_kwargs = False
    """Whether the hook is to have the module's keyword arguments."""

    def __init__(self, name: str, module: nn.Module, passes: Passes) -> None:
        self.name, self.module, self.passes = name, module, passes
        self._original: Tensor | None = None
        self.written: Delta | None = None
        """The change that is in the weight."""

    @property
    def place(self) -> PatchedModule:
        """Where its updates go."""
        return self

    def placed(self, chain: Chain) -> Placed:
        """Its weight's updates as the place takes them."""
        return chain

    def hook(self) -> bool:
        """Put the hook on the module; whether it was not there."""
        if self._add in self.module._forward_hooks.values():
            return False
        # First, so that the user's own hooks see the patched output.
        self.module.register_forward_hook(self._add, prepend=True, with_kwargs=self.wants_kwargs)
        return True

    def unhook(self) -> None:
        """Take the hook off."""
        remove_hook(self.module, self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], *rest: Any) -> Tensor:
        """The hook. While another thread puts it on or takes it off, torch may not know yet, or no more, that it is to
        have the keyword arguments: `rest` is they and the output, or the output alone."""
        output: Tensor = rest[-1]
        live = self.passes.acting().get(self.name)
        return output if live is None else self._added(live, args, rest[0] if len(rest) > 1 else {}, output)

    def _added(self, live: LiveDelta, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return live.hook(self.module, args, output)

    def total(self, updates: Placed) -> Delta | None:
        """Just these updates, in their order, as one change of the weight without patches."""
        where = solve_device(self.module)
        plain = [moved(update, where) for update in updates if not isinstance(update, InBlock)]
        return delta_of(plain, self._rotatable) if plain else None

    @torch.no_grad()
    def write(self, total: Delta | None) -> None:
        """Put the original weight back, and on top of it write `total`."""
        if self._original is None and total is None:
            return
        weight = weight_of(self.module)
        if self._original is None:
            self._original = weight.detach().to("cpu", copy=True)
        if total is None:
            weight.copy_(self._original)
            self._original = self.written = None
            return
        self.written = total
        change = oriented(self.module, total.to(device=weight.device).dense())  # as the weight lies
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(self._original.to(device=weight.device, dtype=wide) + change)

    def keep(self) -> None:
        """Make what was written permanent: forget the original weight."""
        self._original = self.written = None

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

    def whole(self) -> Tensor:
        """The weight (d_out, d_in) without patches, in float32.

        Raises:
            InputError: it is quantized.
        """
        weight = self.base_weight()
        if weight is None:
            raise InputError(f"{self.name}.weight: quantized")
        return oriented(self.module, weight).float()

    @torch.no_grad()
    def _rotatable(self) -> Tensor:
        """W (d_out, d_in) without patches, in float32; of a quantized module, what it multiplies with."""
        weight = self.base_weight()
        if weight is not None:
            return oriented(self.module, weight).float()
        shape = shape_of(self.module)
        assert shape is not None
        eye = torch.eye(shape[1], device=next(self.module.buffers(), torch.empty(0)).device)  # (d_in, d_in)
        with self.passes.seeing(NOTHING):
            output = self.module(torch.cat([eye, 0 * eye[:1]]))  # (d_in + 1, d_out), the last row being the bias
        assert isinstance(output, Tensor)
        return (output[:-1] - output[-1:]).T.float()


class PatchedExperts(PatchedModule):
    """A module of experts with the updates of the active patches on the output projections of some of them."""

    wants_kwargs = True

    def __init__(self, experts: StackedExperts, passes: Passes) -> None:
        super().__init__(experts.name, experts.module, passes)
        self.experts = experts
        self._originals: dict[int, Tensor] = {}

    def _added(self, live: LiveDelta, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return live.hook_of_experts(self.experts, self.module, args, kwargs, output)

    def total(self, updates: Placed) -> Delta | None:
        """Just these updates, in their order, as one change of all experts' weights side by side."""
        chains, where = dict[int, list[Update]](), solve_device(self.module)
        for each in updates:
            assert isinstance(each, InBlock)
            chains.setdefault(each.block, []).append(moved(each.update, where))
        parts = {expert: delta_of(chain, partial(self._wide, expert)) for expert, chain in sorted(chains.items())}
        return joined(parts, self.experts.count) if parts else None

    @torch.no_grad()
    def write(self, total: Delta | None) -> None:
        """Put the original weights back, and on top of them write `total`."""
        for expert, original in self._originals.items():
            self.experts.stored(expert).copy_(original)
        self._originals, self.written = {}, total
        if total is None:
            return
        for expert in in_blocks(total.right.T, self.experts.count):
            weight = self.experts.stored(expert)
            self._originals[expert] = weight.to("cpu", copy=True)
            part = slice(expert * self.experts.width, (expert + 1) * self.experts.width)
            change = self.experts.oriented(Delta(total.left, total.right[:, part]).to(device=weight.device).dense())
            weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + change)

    def keep(self) -> None:
        """Make what was written permanent: forget the original weights."""
        self._originals, self.written = {}, None

    def check_writable(self) -> None:
        """Raises InputError where nothing can be written into the weights."""
        if self.experts.stack.is_meta:
            raise InputError(f"{self.name}: offloaded, so that nothing can be merged into it; attach without merged")

    def original(self, expert: int) -> Tensor:
        """An expert's weight without patches, as it is stored."""
        written = self._originals.get(expert)
        return self.experts.stored(expert) if written is None else written

    def _wide(self, expert: int) -> Tensor:
        return self.experts.oriented(self.original(expert)).float()


class PatchedExpert:
    """One of the experts, as a weight that a patch is for."""

    def __init__(self, place: PatchedExperts, expert: int) -> None:
        self.place, self.expert = place, expert

    def placed(self, chain: Chain) -> Placed:
        """Its weight's updates as the place takes them."""
        return tuple(InBlock(self.expert, update) for update in chain)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        return self.place.experts.d_out, self.place.experts.width

    @property
    def described(self) -> str:
        """Shape, for error messages."""
        return f"{self.shape[0]} x {self.shape[1]}"

    def base_weight(self) -> Tensor:
        """The weight without patches, as it is stored."""
        return self.place.original(self.expert)

    def whole(self) -> Tensor:
        """The weight (d_out, d_in) without patches, in float32."""
        return self.place.experts.oriented(self.base_weight()).float()


PatchedWeight = PatchedModule | PatchedExpert


def check_base(patch: Patch, modules: Mapping[str, PatchedWeight], numbers: bool) -> None:
    """Raises InputError where a module's weight has not the shape, or with `numbers` the digest, that is the base's.

    What is quantized, here or where the patch was made, cannot be compared by its numbers, which a warning says.
    """
    base, unknown = patch.manifest.base, []
    for weight, module in modules.items():
        if weight in patch.shapes and module.shape != patch.shapes[weight]:
            raise base.wrong_shape(weight, module.described)
        stored = module.base_weight() if numbers else None
        if stored is None:
            unknown.append(weight)
        elif tensor_digest(weight, stored) != base.weights.get(weight):
            if base.same_everywhere:
                raise base.wrong_numbers(weight)
            unknown.append(weight)
    if numbers and unknown:
        quantized = f"{len(unknown)} of {len(modules)} touched weights {agreeing(len(unknown), 'are')} quantized"
        warnings.warn(
            f"{quantized} ({unknown[0]}): compared with {base.name} by name and shape, not by their numbers",
            stacklevel=_callers_level(),
        )


def made_for(patch: Patch, weight: str, chain: Chain, module: PatchedWeight, quantized: str | None) -> Chain:
    """A weight's updates, for the weight that is there: its own, or the one that its own was quantized of.

    Args:
        quantized: with what the model that is there was, if its weights are whole numbers now or some of them are.

    Raises:
        InputError: as `folding_at_full_precision` does.
    """
    if module.base_weight() is None:
        return chain
    find = folding_at_full_precision if quantized is None else folding_of
    scales = find(patch, weight, module.whole)
    return chain if scales is PLAIN else (unfolded(chain, scales, module.whole),)


def _callers_level() -> int:
    """The `stacklevel` of a warning by which it names the line that called patchkit, through whatever it was called."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in ("patchkit", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
