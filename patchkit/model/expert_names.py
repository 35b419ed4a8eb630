"""What the weights of experts are called: in a checkpoint's files, and where a name means one in a module tree."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.model.separate_experts import SeparateExperts
from patchkit.model.stacked_experts import stacks
from patchkit.model.weights import Site, matching, stored_names_of

_PLACES = "_patchkit_expert_places"
"""What the names of experts are kept under in a tree without numbers, which nobody else has."""


def slice_name(stack: str, expert: int) -> str:
    """What one expert's part of a stack of weights is called."""
    return f"{stack}[{expert}]"


def names_on_disk(model: Any, stack: str, count: int) -> tuple[str, ...]:
    """What the weights in the parameter `stack` of a model are called in the checkpoints of its kind, one for each of
    its `count` experts: names of tensors, or parts of the one tensor that holds all (`slice_name`).

    transformers' own table says which: what it would save a tensor as whose slices are marked.
    """
    from transformers.core_model_loading import revert_weight_conversion

    marked = torch.arange(count, dtype=torch.float32).view(-1, 1, 1).expand(count, 4, 6).contiguous()
    saved = revert_weight_conversion(model, {stack: marked})
    if len(saved) == count and all(each.ndim == 2 for each in saved.values()):
        by_expert = {int(each[0, 0]): str(name) for name, each in saved.items()}
        if len(by_expert) == count:
            return tuple(by_expert[expert] for expert in range(count))
    whole = [str(name) for name, each in saved.items() if each.shape == marked.shape]
    return tuple(slice_name(whole[0] if len(whole) == 1 else stack, expert) for expert in range(count))


def split_name(weight: str) -> tuple[str, int | None]:
    """A weight's name without the number of the slice that it is, and that number, None for a whole tensor."""
    stack, bracket, number = weight.removesuffix("]").rpartition("[")
    return (stack, int(number)) if bracket and weight.endswith("]") and number.isdigit() else (weight, None)


def expert_sites(model: PreTrainedModel, site: Site) -> tuple[Site, ...]:
    """The parts of a site, one for each expert, named as in the checkpoint's files; none where it has no experts."""
    return ExpertNames(model).sites(site)


class ExpertNames:
    """What the checkpoint's files call the weights of experts: by what is there, or where there are no files to look
    at, by what transformers would write."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _stored(self) -> frozenset[str]:
        assert isinstance(self.model, PreTrainedModel)
        return stored_names_of(self.model)

    def sites(self, site: Site) -> tuple[Site, ...]:
        """The parts of a site; see `expert_sites`."""
        experts = site.experts
        if experts is None or site.expert is not None:
            return ()
        if isinstance(experts, SeparateExperts):
            own = tuple(self._own(f"{experts.linear_name(i)}.weight") for i in range(experts.count))
        else:
            own = self.of(experts.weight_name, experts.count)
        return tuple(replace(site, weight_name=name, d_in=experts.width, expert=i) for i, name in enumerate(own))

    def _own(self, weight: str) -> str:
        """That of a tensor of its own."""
        found = matching(weight, self._stored)
        return found[0] if len(found) == 1 else weight

    def of(self, stack: str, count: int) -> tuple[str, ...]:
        """Those of each of `count` experts, whose weights are in the parameter `stack`."""
        names, stored = names_on_disk(self.model, stack, count), self._stored
        if stored and not matching(names[0].partition("[")[0], stored) and matching(stack, stored):
            return tuple(slice_name(matching(stack, stored)[0], expert) for expert in range(count))
        return names


def expert_places(model: PreTrainedModel) -> dict[str, tuple[str, str, int]]:
    """By every name that the weight of an expert may have, on disk or as a part of its stack, the module that it is in,
    the parameter there, and its number."""
    found: dict[str, tuple[str, str, int]] = {}
    names = ExpertNames(model)
    for name, module in model.named_modules():
        for parameter, stack in stacks(module).items():
            whole = f"{name}.{parameter}"
            for expert, own in enumerate(names.of(whole, len(stack))):
                found[own] = found[slice_name(whole, expert)] = name, parameter, expert
    return found


def member_of(weight: str, stacks: Collection[str]) -> tuple[str, int] | None:
    """The name in `stacks`, of the weights of a layer's experts together, that an expert's own is made from by putting
    its number in, and that number; None where there is none."""
    parts = weight.removesuffix(".weight").split(".")
    for place, part in enumerate(parts):
        together = ".".join([*parts[:place], *parts[place + 1 :]])
        if part.isdigit() and len(found := matching(together, stacks)) == 1:
            return found[0], int(part)
    return None


@dataclass(frozen=True)
class ExpertPlace:
    """Where the weight of one of `count` experts is in a module tree: a slice of the parameter `stack`, as (d_out,
    width) or with `transposed` as (width, d_out)."""

    module: str
    parameter: str
    expert: int
    count: int
    transposed: bool

    @property
    def stack(self) -> str:
        """Name of the parameter in the tree."""
        return f"{self.module}.{self.parameter}"


def find_expert(model: PreTrainedModel, weight: str, shape: tuple[int, int]) -> ExpertPlace | None:
    """Where an expert's weight of `shape` (d_out, d_in) is; None where the name is that of no expert. The model need
    not have its numbers: how a square weight lies is told by what transformers says of the module.

    Raises:
        InputError: it has another shape here.
    """
    places = _places_of(model)
    known = matching(weight, places)
    if not known:
        return None
    name, parameter, expert = places[known[0]]
    module = model.get_submodule(name)
    lies = tuple(module.get_parameter(parameter).shape[1:])
    if lies not in (shape, shape[::-1]):
        raise InputError(f"{weight}: {lies} in {type(model).__name__}, {shape} in the patch; it is another model")
    transposed = bool(getattr(module, "is_transposed", False)) if lies == lies[::-1] else lies != shape
    return ExpertPlace(name, parameter, expert, len(module.get_parameter(parameter)), transposed)


def _places_of(model: PreTrainedModel) -> dict[str, tuple[str, str, int]]:
    if not any(stacks(module) for module in model.modules()):
        return {}
    known: dict[str, tuple[str, str, int]] | None = model.__dict__.get(_PLACES)
    if known is None:
        known = model.__dict__[_PLACES] = expert_places(model)
    return known
