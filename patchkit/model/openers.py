"""The weights that open a feed-forward: what a neuron listens to is a row of each, what it says a column of the site.

As in `patchkit.model.arch`, what is there is found by looking and by trying, never by a model's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.model.arch import Architecture
from patchkit.model.expert_names import ExpertNames
from patchkit.model.threads import in_this_thread
from patchkit.model.weights import Site, is_linear, is_quantized, shape_of, weight_of


@dataclass(frozen=True)
class Opener:
    """Rows of a weight that neurons listen with, one for each, from row `first` on. A fused weight (Phi-3's) has two
    openers, one after the other."""

    site: Site
    first: int = 0


@dataclass(frozen=True)
class Openers:
    """What opens a feed-forward: the rows that decide whether a neuron fires, and those that say how much, if there are
    two for each."""

    gate: Opener
    amount: Opener | None

    @property
    def all(self) -> tuple[Opener, ...]:
        """Both, or the one; of a fused weight in the order of its rows."""
        found = (self.gate,) if self.amount is None else (self.gate, self.amount)
        return tuple(sorted(found, key=lambda opener: opener.first))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The weights that they are in."""
        return tuple({opener.site.module_name: opener.site for opener in self.all}.values())


def opening_sites(arch: Architecture, site: Site) -> tuple[Site, ...]:
    """The linear layers beside the output projection `site` that lead from the stream to its inner width, or twice."""
    prefix = site.module_name.rpartition(".")[0]
    found = arch.model.get_submodule(prefix).named_children()
    names = [(f"{prefix}.{name}", module) for name, module in found if is_linear(module) and not is_quantized(module)]
    shapes = [(name, module, shape_of(module) or (0, 0)) for name, module in names]
    return tuple(
        Site(site.layer, f"{name}.weight", name, module, d_in, d_out, direct=False, opens=True)
        for name, module, (d_out, d_in) in shapes
        if d_in == arch.hidden_size and d_out in (site.d_in, 2 * site.d_in)
    )


def all_sites(arch: Architecture) -> Iterator[Site]:
    """Every weight of `arch` that a patch can change, and those of experts together."""
    names = ExpertNames(arch.model)
    for site in arch.sites:
        yield site
        yield from opening_sites(arch, site)
        yield from names.sites(site)


def openers(arch: Architecture, site: Site) -> Openers:
    """What opens the feed-forward of `site`. The model is left as it is.

    Raises:
        InputError: the feed-forward is opened otherwise, by rows of a fused weight that take turns for example.
    """
    weights = opening_sites(arch, site)
    found = [Opener(weight, first) for weight in weights for first in range(0, weight.d_out, site.d_in)]
    if len(found) == 1:
        return Openers(found[0], None)
    scaling = [_scales(arch, site, each) for each in found] if len(found) == 2 else []
    if sorted(scaling) != [False, True]:
        names = ", ".join(each.module_name.rpartition(".")[2] for each in weights) or "none"
        raise InputError(
            f"neurons=on: looked for one or two weights that open the feed-forward of layer {site.layer}, found "
            f"{names}; use neurons=off"
        )
    gate, amount = found if scaling[1] else reversed(found)
    return Openers(gate, amount)


def _scales(arch: Architecture, site: Site, opener: Opener) -> bool:
    """Whether neurons fire twice as much where the opener says twice as much: then no activation comes after it."""
    module, first, last = opener.site.module, opener.first, opener.first + site.d_in
    weight = weight_of(module)
    numbers = torch.randn(4, arch.hidden_size, generator=torch.Generator().manual_seed(0))
    x = numbers.to(weight.device, weight.dtype)

    def double(_module: nn.Module, args: object, output: Tensor) -> Tensor:
        return torch.cat([output[..., :first], 2 * output[..., first:last], output[..., last:]], -1)

    before = firing(arch, site, x)
    handle = module.register_forward_hook(in_this_thread(double))
    try:
        after = firing(arch, site, x)
    finally:
        handle.remove()
    return bool(torch.allclose(after.float(), 2 * before.float(), rtol=1e-2, atol=1e-6))


@torch.no_grad()
def firing(arch: Architecture, site: Site, states: Tensor) -> Tensor:
    """How much each neuron of the site's feed-forward fires, (n, d_in), where the feed-forward reads `states` (n,
    hidden). Only for those that have two openers, or rows of one, and are blocks of their own."""
    block, found = arch.model.get_submodule(site.module_name.rpartition(".")[0]), list[Tensor]()
    note = in_this_thread(lambda module, args: found.append(args[0]))
    handle = site.module.register_forward_pre_hook(note)
    try:
        block(states.unsqueeze(0))
    finally:
        handle.remove()
    return found[0].view(len(states), -1)
