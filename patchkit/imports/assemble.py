"""A patch from updates that patchkit did not make, and the same patch with them taken out again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.io.checkpoint import DTYPES, StoredTensor, find_checkpoint, stored_tensors
from patchkit.maths.updates import Chain
from patchkit.model.digests import tensor_digest
from patchkit.model.weights import find_module, find_weight, is_linear, oriented, skeleton
from patchkit.patch.infos import update_infos
from patchkit.patch.manifest import BaseInfo, Manifest, Run, Source, UpdateInfo
from patchkit.patch.patch import Patch, updates_digest
from patchkit.patch.resolve import with_run
from patchkit.statistics.corpus import TextRecord
from patchkit.version import stamp


@dataclass(frozen=True)
class Base:
    """The checkpoint that a change belongs to, on its files: no model is loaded.

    Attributes:
        name: folder or Hub name; the files of a repository have to be in the cache.
    """

    name: str

    @cached_property
    def folder(self) -> Path:
        """Where its files lie.

        Raises:
            InputError: they are not on this machine.
        """
        return find_checkpoint(self.name)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """Its tensors by name."""
        return stored_tensors(self.folder)

    @cached_property
    def tree(self) -> nn.Module:
        """Its modules, without weights."""
        return skeleton(self.folder)

    def module(self, weight: str) -> nn.Module | None:
        """The linear layer of a weight by its on-disk name; None of a weight that no linear layer has."""
        try:
            _, module = find_module(self.tree, weight, "")
        except InputError:  # a bias, or a norm's or an embedding's weight in a model that ties it
            return None
        return module if is_linear(module) else None

    def name_of(self, module: str) -> str:
        """On-disk name of the weight of a module in the tree.

        Raises:
            InputError: there is none, or it is stored in a form that cannot be read.
        """
        advice = "the adapter is for another model; name its base with --model"
        weight = find_weight(f"{module}.weight", self.stored, str(self.folder), advice)
        if self.stored[weight].dtype not in DTYPES:
            kind = self.stored[weight].dtype
            raise InputError(
                f"{weight}: stored as {kind} in {self.folder}, which is quantized; name the full-precision checkpoint "
                "with --model"
            )
        return weight

    def weight(self, name: str) -> Tensor:
        """W (d_out, d_in) of a linear layer, as it is stored."""
        module = self.module(name)
        assert module is not None
        return oriented(module, self.stored[name].read())

    def info(self, weights: Iterable[str]) -> BaseInfo:
        """What a manifest says of it, with the digests of `weights`."""
        local = Path(self.name).is_dir()
        return BaseInfo(
            name=str(self.folder) if local else self.name,
            commit=None if local else self.folder.name,
            architecture=type(self.tree).__name__,
            weights={name: tensor_digest(name, self.stored[name].read()) for name in weights},
        )


def imported(base: Base, chains: Mapping[str, Chain], source: Source) -> Patch:
    """A patch of `chains`, by on-disk name of the weights of `base`, with one run in its history that names `source`.

    Raises:
        InputError: nothing changes.
    """
    if not chains:
        raise InputError(f"{source.name}: changes nothing in {base.name}; there is nothing to import")
    infos = [info for name, chain in chains.items() for info in _infos(base, name, chain)]
    run = Run(
        action="import",
        method="import",
        paper="",
        recipe={},
        recipe_digest="",
        facts=(),
        batches=(),
        layers=tuple(sorted({layer for name in chains for layer in _layers(name)})),
        value_at="",
        contexts=(),
        text=TextRecord(),
        seconds={},
        source=source,
        **stamp(),
    )
    manifest = Manifest(
        base=base.info(chains), facts=(), updates=tuple(infos), history=(run,), digest=updates_digest(chains)
    )
    return Patch(manifest, chains)


def without_import(patch: Patch) -> Patch:
    """The patch with nothing left of what was imported, and a run in its history that says so."""
    manifest, nothing = patch.manifest, dict[str, Chain]()
    empty = Patch(manifest.model_copy(update={"updates": (), "digest": updates_digest(nothing)}), nothing)
    gone = {"action": "revert", "metrics": None, "source": None, "origin": None, **stamp()}
    return with_run(empty, manifest.history[-1].model_copy(update=gone), manifest.digest)


def _infos(base: Base, name: str, chain: Chain) -> list[UpdateInfo]:
    return list(update_infos(name, base.weight(name).float(), chain))


def _layers(name: str) -> list[int]:
    """The layer of a weight: the first number in its name."""
    return [int(number) for number in re.findall(r"\.(\d+)\.", name)[:1]]
