"""What every export works with, and the record of what it made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.export.edits import quantized_with
from patchkit.io.checkpoint import find_checkpoint, stored_tensors
from patchkit.io.records import FrozenRecord
from patchkit.maths.folding import PLAIN
from patchkit.maths.linalg import Delta
from patchkit.model.expert_names import ExpertPlace, find_expert, split_name
from patchkit.model.loading import DTYPES, load_model
from patchkit.model.weights import (
    find_module,
    find_weight,
    oriented,
    shape_of,
    skeleton,
    weight_of,
)
from patchkit.patch.manifest import BaseInfo, Manifest
from patchkit.patch.patch import Patch
from patchkit.patch.unfolded import folding_at_full_precision, unfolded
from patchkit.version import patchkit_version


class ExportedWeight(FrozenRecord):
    """One update in the adapter. error: ‖E - Δ‖/‖Δ‖ (Frobenius), from truncation and from rounding to the dtype."""

    weight: str
    module: str
    rank: int
    error: float


class Exported(FrozenRecord):
    """patchkit-manifest.json of an export. Every layer has this rank; zeros fill up lower ones."""

    format_version: int = 1
    action: Literal["export"] = "export"
    format: str
    rank: int
    dtype: str
    weights: tuple[ExportedWeight, ...]
    zero_layers: tuple[str, ...] = ()
    parents: tuple[Manifest, ...]
    patchkit: str

    @property
    def base(self) -> BaseInfo:
        """The model that the patch was made for."""
        return self.parents[0].base


@dataclass(frozen=True)
class Options:
    """What an export may be told. An exporter says which of these it takes beside the dtype.

    Attributes:
        rank: at most this rank, by the best approximation there is of each update.
        all_layers: also write zeros for the layers the patch does not touch, for servers that want every layer.
        gguf_base: the base as a GGUF file, to check an adapter for it against.
        dtype: of the numbers written.
    """

    rank: int | None = None
    all_layers: bool = False
    gguf_base: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Job:
    """A patch on its way into another format.

    Attributes:
        base: folder or Hub name of the base, of which config.json is read, and the weights where a rotation needs them.
        title: the name of the folder that is written.
    """

    patch: Patch
    base: str
    title: str
    options: Options = field(default_factory=Options)

    @property
    def commit(self) -> str | None:
        """The base's commit, if it is the base that the patch names."""
        info = self.patch.manifest.base
        return info.commit if self.base == info.name else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers written."""
        return DTYPES[self.options.dtype]

    @cached_property
    def tree(self) -> PreTrainedModel:
        """The base without its weights: says what runtimes call the modules, which the checkpoint's names may not."""
        return skeleton(self.base, self.commit)

    @cached_property
    def modules(self) -> dict[str, str]:
        """Names in the tree by the on-disk names of the changed weights, those of experts left out."""
        linear = [weight for weight in self.patch.updates if weight not in self.experts]
        return {weight: _module_of(self.tree, weight, self.patch.shapes[weight]) for weight in linear}

    @cached_property
    def experts(self) -> dict[str, ExpertPlace]:
        """Where the changed weights of experts are in the tree, by their on-disk names."""
        found = {weight: find_expert(self.tree, weight, self.patch.shapes[weight]) for weight in self.patch.updates}
        return {weight: place for weight, place in found.items() if place is not None}

    def refuse_experts(self, kind: str) -> None:
        """Raises InputError where a format has no room for changes of experts, which the patch makes."""
        if self.experts:
            raise InputError(
                f"--format {kind}: it has no adapters for the experts of a layer, such as "
                f"{next(iter(self.experts))}; export to peft or gguf, or merge the patch"
            )

    def delta(self, weight: str) -> Delta:
        """A weight's chain as one low-rank delta; of a rotation (R - I) W, with W from the base's files.

        Raises:
            InputError: W is needed and is not on this machine.
        """
        there, chain = partial(self._weight_on_disk, weight), self.patch.updates[weight]
        return unfolded(
            chain, folding_at_full_precision(self.patch, weight, there) if self._of_quantized else PLAIN, there
        )

    def exported(self, kind: str, rank: int, weights: tuple[ExportedWeight, ...], zeros: tuple[str, ...]) -> Exported:
        """The record of what was written."""
        return Exported(
            format=kind,
            rank=rank,
            dtype=self.options.dtype,
            weights=weights,
            zero_layers=zeros,
            parents=(self.patch.manifest,),
            patchkit=patchkit_version(),
        )

    @cached_property
    def _of_quantized(self) -> bool:
        """Whether the base is the checkpoint that the patch's own was quantized of."""
        if self.patch.manifest.base.quantized is None or self.base == self.patch.manifest.base.name:
            return False
        return quantized_with(find_checkpoint(self.base, self.commit)) is None

    @cached_property
    def _whole(self) -> PreTrainedModel:
        """The base with its weights: where these are packed, files do not say what a rotation turned."""
        return load_model(self.base, "cpu").model

    def _weight_on_disk(self, weight: str) -> Tensor:
        if self.patch.manifest.base.quantized and self.base == self.patch.manifest.base.name and not self.experts:
            there = self._whole.get_submodule(self.modules[weight])
            return oriented(there, weight_of(there).detach()).float()
        folder = find_checkpoint(self.base, self.commit)
        stored = stored_tensors(folder)
        advice = "which a rotation needs; name the patch's base with --model"
        if place := self.experts.get(weight):
            whole, number = split_name(weight)
            tensor = stored[find_weight(whole, stored, str(folder), advice)]
            numbers = (tensor if number is None else tensor.slice(number)).read().float()
            return numbers.T if place.transposed else numbers
        module = self.modules[weight]
        found = find_weight(f"{module}.weight", stored, str(folder), advice)
        return oriented(self.tree.get_submodule(module), stored[found].read()).float()


def _module_of(tree: nn.Module, weight: str, shape: tuple[int, int]) -> str:
    name, module = find_module(tree, weight, "name the patch's own base with --model")
    if (there := shape_of(module)) != shape:
        raise InputError(f"{weight}: {there} in {type(tree).__name__}, {shape} in the patch; it is another model")
    return name
