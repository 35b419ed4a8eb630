"""Patches on a live model: attached by hooks, stacked, disabled, merged into the weights, and taken off again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.hub import is_repo_name
from patchkit.maths.updates import Chain
from patchkit.model.weights import find_module, tensor_digest
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch
from patchkit.patch.patched import PatchedModule

_ATTRIBUTE = "patchkit"


def load(
    model: nn.Module,
    patch: str | Path | Patch,
    name: str | None = None,
    *,
    merged: bool = False,
    force: bool = False,
) -> PatchStack:
    """Attach `patch` to a model of transformers, on top of the patches that it has.

    Weights are not written: a hook adds the patch's delta to a module's output, so quantized models, and those that
    device_map spreads over GPUs, CPU and disk, take patches as well.

    Args:
        model: the base; a module that torch.compile returned is fine.
        patch: a patch's folder, a Hub repository ("user/repo" or "user/repo@revision"), or a `Patch`.
        name: what to call it; without one, the last part of the folder or repository.
        merged: write the patch into the weights instead, with the originals kept; see `PatchStack.merge`.
        force: attach it although the weights are not those it was made for, as long as the shapes fit.

    Returns:
        The model's patches, also found as `model.patchkit` while there are any.

    Raises:
        InputError: no such patch, a patch for another base, a name that is taken, or weights that cannot be merged.

    Examples:
        With `model` and `patch` as in the example of `patchkit.apply`:

        >>> stack = patchkit.load(model, patch, "cities")
        >>> stack
        PatchStack(cities; active: cities; attached)
        >>> with stack.disable():
        ...     pass  # here the model is its base
        >>> model is stack.unload()
        True
    """
    stack = PatchStack.of(model)
    stack.load(patch, name, merged=merged, force=force)
    return stack


def from_pretrained(
    patch: str | Path | Patch,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    merged: bool = False,
    force: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load the base that `patch` names, at the commit that it names, and attach the patch.

    Args:
        patch: as in `load`.
        base: a folder or Hub name of the base, in place of the patch's.
        name: as in `load`.
        merged: as in `load`.
        force: as in `load`.
        options: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, quantization_config and so on.

    Returns:
        The model, with its patches as `model.patchkit`, and its tokenizer.

    Raises:
        InputError: as in `load`, or the base cannot be loaded.

    Examples:
        >>> patched, tokenizer = patchkit.from_pretrained(folder)  # a patch's folder
        >>> len(patched.patchkit.active)
        1
    """
    read = _read(patch)
    where = str(base or read.manifest.base.name)
    if not Path(where).exists() and not is_repo_name(where) and "/" in where:
        raise InputError(f"base model {where}: no such folder; base= says where else it is")
    if base is None and not Path(where).exists():
        options = {"revision": read.manifest.base.commit, **options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=options.get("revision"))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"base model {where}: cannot be loaded: {reason}; base= says where else it is") from None
    load(model, read, name or _name_of(patch), merged=merged, force=force)
    return model, tokenizer


@dataclass(frozen=True)
class _Attached:
    """A patch on the model: its chains of updates by module name."""

    manifest: Manifest
    chains: Mapping[str, Chain]


class PatchStack:
    """The patches on one model. Several of them act as if merged one after the other, in the order of `active`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attached: dict[str, _Attached] = {}
        self._touched: dict[str, PatchedModule] = {}
        self._active: tuple[str, ...] = ()
        self._merged = False
        self._disabled = 0

    @classmethod
    def of(cls, model: nn.Module) -> PatchStack:
        """The model's patches: those in `model.patchkit`, or a new stack without any."""
        owner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        assert isinstance(owner, nn.Module)
        stack = getattr(owner, _ATTRIBUTE, None) or cls(owner)
        assert isinstance(stack, PatchStack)
        return stack

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every patch on the model, by the patch's name."""
        return {name: attached.manifest for name, attached in self._attached.items()}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active patches, in the order in which they act."""
        return self._active

    @property
    def merged(self) -> bool:
        """Whether the active patches are written into the weights."""
        return self._merged

    def __repr__(self) -> str:
        mode = "merged" if self._merged else "attached"
        return f"PatchStack({', '.join(self._attached)}; active: {', '.join(self._active) or 'none'}; {mode})"

    def load(
        self, patch: str | Path | Patch, name: str | None = None, *, merged: bool = False, force: bool = False
    ) -> None:
        """Add a patch on top of the active ones; arguments and errors as in `patchkit.load`."""
        name, read = name or _name_of(patch), _read(patch)
        for other, attached in self._attached.items():
            if attached.manifest.digest == read.manifest.digest:
                raise InputError(f'patch "{name}": the model has it already, as "{other}"; it can act only once')
        if name in self._attached:
            raise InputError(f'patch "{name}": the model has one of that name; give this one another, name="..."')
        base = read.manifest.base
        found = {weight: find_module(self._model, weight, base.advice) for weight in {**base.weights, **read.updates}}
        modules = {weight: self._touched.get(key) or PatchedModule(key, each) for weight, (key, each) in found.items()}
        _check(read, modules, numbers=not force)
        touched = {modules[weight].name: modules[weight] for weight in read.updates}
        chains = {modules[weight].name: chain for weight, chain in read.updates.items()}
        if merged or self._merged:
            for place in touched.values():
                place.check_writable()
        self._attached[name] = _Attached(read.manifest, chains)
        self._touched |= touched
        self._active, self._merged = (*self._active, name), merged or self._merged
        self._update()

    @contextmanager
    def attached(self, patch: Patch) -> Iterator[nn.Module]:
        """Inside the block, `patch` acts on top of the active ones.

        Raises:
            InputError: as in `patchkit.load`, or inside `disable`, where it would not act.
        """
        if self._disabled:
            raise InputError("the model's patches are disabled, and one attached now would be, too; attach it before")
        name = f"attached {patch.manifest.digest[:12]}"
        self.load(patch, name)
        try:
            yield self._model
        finally:
            if name in self._attached:  # unless the block took all patches off
                self.delete(name)

    def set_active(self, names: str | Iterable[str]) -> None:
        """Activate just these patches, in this order; the others stay attached but inactive.

        Raises:
            InputError: there is no such patch on the model, or one is named twice.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names)
        for name in chosen:
            self._require(name)
        if len(set(chosen)) < len(chosen):
            raise InputError(f"{', '.join(chosen)}: a patch is named twice; it can act only once")
        self._active = chosen
        self._update()

    @contextmanager
    def disable(self) -> Iterator[nn.Module]:
        """Inside the block, the model is its base again."""
        self._disabled += 1
        try:
            self._update()
            yield self._model
        finally:
            self._disabled -= 1
            self._update()

    def delete(self, name: str) -> None:
        """Take one patch off the model.

        Raises:
            InputError: it is not there.
        """
        self._require(name)
        del self._attached[name]
        self._active = tuple(other for other in self._active if other != name)
        self._update()

    def merge(self) -> None:
        """Write the active patches into the weights, and keep the originals in memory on the CPU.

        There is no overhead then. Each weight is rounded to nearest in its dtype: in 16 bits that loses part of a
        small delta, which attached patches keep; so does `patchkit merge`, which rounds with error feedback.

        Raises:
            InputError: a weight is quantized or offloaded.
        """
        for place in self._touched.values():
            place.check_writable()
        self._merged = True
        self._update()

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and let the active patches act by hooks again."""
        self._merged = False
        self._update()

    def unload(self) -> nn.Module:
        """Take all patches off: weights bit for bit as they were, no hooks. Returns the model."""
        self._attached, self._active, self._merged = {}, (), False
        self._update()
        return self._model

    def merge_and_unload(self) -> nn.Module:
        """Leave the active patches in the weights for good, with no hooks and no originals. Returns the model.

        Raises:
            InputError: a weight is quantized or offloaded.
        """
        self.merge()
        for place in self._touched.values():
            place.keep()
        return self.unload()

    def _require(self, name: str) -> None:
        if name not in self._attached:
            known = ", ".join(self._attached) or "none at all"
            raise InputError(f'patch "{name}": not on this model; it has {known}')

    def _update(self) -> None:
        """Bring hooks and weights in line with the attached and the active patches."""
        acting = () if self._disabled else self._active
        hooks = {key for key, place in self._touched.items() if place.hooked}
        for key, place in list(self._touched.items()):
            if any(key in attached.chains for attached in self._attached.values()):
                stacked = [self._attached[name].chains.get(key, ()) for name in acting]
                place.show([update for chain in stacked for update in chain], self._merged)
            else:
                self._touched.pop(key).release()
        if self._attached:
            setattr(self._model, _ATTRIBUTE, self)
        elif hasattr(self._model, _ATTRIBUTE):
            delattr(self._model, _ATTRIBUTE)
        if hooks != self._touched.keys() and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice hooks that come and go; what they add, it does


def _read(patch: str | Path | Patch) -> Patch:
    return patch if isinstance(patch, Patch) else Patch.load(patch)


def _name_of(patch: str | Path | Patch) -> str:
    return "patch" if isinstance(patch, Patch) else Path(patch).absolute().name


def _check(patch: Patch, modules: Mapping[str, PatchedModule], numbers: bool) -> None:
    """Raises InputError where a module's weight has not the shape, or with `numbers` the digest, that is the base's.

    What is quantized cannot be compared by its numbers, which a warning says.
    """
    base, unknown = patch.manifest.base, []
    for weight, module in modules.items():
        if weight in patch.shapes and module.shape != patch.shapes[weight]:
            raise base.wrong_shape(weight, module.described)
        stored = module.base_weight() if numbers else None
        if stored is None:
            unknown.append(weight)
        elif tensor_digest(weight, stored) != base.weights.get(weight):
            raise base.wrong_numbers(weight)
    if numbers and unknown:
        warnings.warn(
            f"{len(unknown)} of {len(modules)} touched weights are quantized ({unknown[0]}): compared with {base.name} "
            "by name and shape, not by their numbers",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The `stacklevel` of a warning by which it names the line that called patchkit, through whatever it was called."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in ("patchkit", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
