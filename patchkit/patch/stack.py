"""Patches on a live model: attach them, stack them, switch them off, merge them, take them off without a trace."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.hub import is_repo_name, patch_folder
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain, Update, change
from patchkit.model.hooks import LiveDelta
from patchkit.model.weights import (
    find_module,
    is_quantized,
    loaded_weight,
    oriented,
    shape_of,
    tensor_digest,
    weight_of,
)
from patchkit.patch.manifest import BaseInfo, Manifest
from patchkit.patch.patch import Patch

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

    Weights are not written: a hook adds the change to what a module puts out, so quantised models, and those that
    device_map spreads over GPUs, CPU and disk, take patches as well.

    Args:
        model: the base; a module that torch.compile returned is fine.
        patch: a patch's folder, a Hub repository ("user/repo" or "user/repo@revision"), or a `Patch`.
        name: what to call it; without one, the last part of the folder or repository.
        merged: write the change into the weights instead, with the originals kept; see `PatchStack.merge`.
        force: attach it although the weights are not those it was made for, as long as the shapes fit.

    Returns:
        The model's patches, also found as `model.patchkit` while there are any.

    Raises:
        InputError: no such patch, a patch for another base, a name that is taken, or weights that cannot be merged.
    """
    owner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    assert isinstance(owner, nn.Module)
    stack = getattr(owner, _ATTRIBUTE, None) or PatchStack(owner)
    assert isinstance(stack, PatchStack)
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
        patch, name, merged, force: as in `load`.
        base: a folder or Hub name of the base, in place of the patch's.
        options: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, quantization_config and so on.

    Returns:
        The model, with its patches as `model.patchkit`, and its tokenizer.

    Raises:
        InputError: as in `load`, or the base cannot be loaded.
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
    """A patch on the model: its changes by the name that the touched module has there."""

    manifest: Manifest
    chains: Mapping[str, Chain]


class PatchStack:
    """The patches on one model. Several of them act as if merged one after the other, in the order of `active`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attached: dict[str, _Attached] = {}
        self._touched: dict[str, _Touched] = {}
        self._active: tuple[str, ...] = ()
        self._merged = False
        self._disabled = 0

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every patch on the model, by the patch's name."""
        return {name: attached.manifest for name, attached in self._attached.items()}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the patches that act, in their order."""
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
        name = name or _name_of(patch)
        if name in self._attached:
            raise InputError(f'patch "{name}": the model has one of that name; give this one another, name="..."')
        read = _read(patch)
        modules = {weight: find_module(self._model, weight, _wanted(read.manifest.base)) for weight in read.updates}
        touched = {key: self._touched.get(key) or _Touched(key, module) for key, module in modules.values()}
        chains = {modules[weight][0]: chain for weight, chain in read.updates.items()}
        for weight, (key, _) in modules.items():
            touched[key].check_shape(weight, read.shapes[weight], read.manifest.base)
        if not force:
            _check_numbers({weight: touched[key] for weight, (key, _) in modules.items()}, read.manifest.base)
        if merged or self._merged:
            for place in touched.values():
                place.check_writable()
        self._attached[name] = _Attached(read.manifest, chains)
        self._touched |= touched
        self._active, self._merged = (*self._active, name), merged or self._merged
        self._update()

    def set_active(self, names: str | Iterable[str]) -> None:
        """Let just these patches act, in this order; the others stay at hand.

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

        Nothing runs beside the weights then. Each is rounded once to its dtype, to the nearest: in 16 bits that
        loses some of a small change, which attached patches keep, as does `patchkit merge` with its own rounding.

        Raises:
            InputError: a weight is quantised or offloaded.
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
            InputError: a weight is quantised or offloaded.
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
        """Bring hooks and weights in line with which patches there are, which act, and how."""
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


class _Touched:
    """A module whose weight patches change, by a hook or in place."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._live = LiveDelta()
        self._handle: RemovableHandle | None = None
        self._original: Tensor | None = None

    @property
    def hooked(self) -> bool:
        return self._handle is not None

    def show(self, updates: Sequence[Update], merged: bool) -> None:
        """Act with `updates`, in their order, and with nothing else."""
        self._restore()
        total = change(updates, self._rotatable) if updates else None
        self._live.set([total] if total is not None and not merged else [])
        if self._handle is None:
            # First, so that a hook of the user's sees what the patched module puts out.
            self._handle = self.module.register_forward_hook(self._live.hook, prepend=True)
        if merged and total is not None:
            self._write(total)

    def release(self) -> None:
        """Leave the module as it was found."""
        self._restore()
        if self._handle is not None:
            self._handle.remove()

    def keep(self) -> None:
        """Forget the original of what was written."""
        self._original = None

    def check_shape(self, weight: str, wanted: tuple[int, int], base: BaseInfo) -> None:
        """Raises InputError where an update of a weight of shape `wanted` does not fit the module."""
        shape = shape_of(self.module)
        if shape != wanted:
            found = f"{shape[0]} x {shape[1]}" if shape else f"a {type(self.module).__name__}"
            raise InputError(f"{weight}: {found} here, another shape in the patch; {_wanted(base)}")

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
        """W (d_out, d_in) without patches, in float32; of a quantised module, what it multiplies with."""
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


def _read(patch: str | Path | Patch) -> Patch:
    return patch if isinstance(patch, Patch) else Patch.load(patch_folder(patch))


def _name_of(patch: str | Path | Patch) -> str:
    return "patch" if isinstance(patch, Patch) else Path(patch).absolute().name


def _wanted(base: BaseInfo) -> str:
    return f"load {base.name}{f' at commit {base.commit}' if base.commit else ''}"


def _check_numbers(touched: Mapping[str, _Touched], base: BaseInfo) -> None:
    """Raises InputError where a weight is not the base's; what is quantised cannot be compared, which is said."""
    unknown = []
    for name, place in touched.items():
        weight = place.base_weight()
        if weight is None:
            unknown.append(name)
        elif tensor_digest(name, weight) != base.weights[name]:
            raise InputError(
                f"{name}: other numbers than in the model the patch was made for; {_wanted(base)}, "
                "in the dtype of its files or a wider one"
            )
    if unknown:
        warnings.warn(
            f"{len(unknown)} of {len(touched)} touched weights are quantised ({unknown[0]}): compared with {base.name} "
            "by name and shape, not by their numbers",
            stacklevel=4,
        )
