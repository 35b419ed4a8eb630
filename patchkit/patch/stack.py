"""Patches on a live model: attached by hooks, stacked, disabled, merged into the weights, and taken off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.maths.linalg import Delta
from patchkit.model.arch import experts_of
from patchkit.model.dequantized import quantized_with
from patchkit.model.expert_names import expert_places
from patchkit.model.hooks import LiveDelta
from patchkit.model.weights import find_module, matching
from patchkit.patch.locks import lock_of, uninterrupted
from patchkit.patch.manifest import Manifest
from patchkit.patch.passes import Passes, Version, reset_compiled
from patchkit.patch.patch import Patch
from patchkit.patch.patched import (
    PatchedExpert,
    PatchedExperts,
    PatchedModule,
    PatchedWeight,
    Placed,
    check_base,
    made_for,
)
from patchkit.patch.together import refuse_shared_neurons

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
        InputError: no such patch, a patch for another base, a name that is taken, weights that cannot be merged, or an
            active patch that has rewritten the same neuron.

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


@dataclass(frozen=True)
class _Attached:
    """A patch on the model: its chains of updates by module name, and who attached it."""

    manifest: Manifest
    chains: Mapping[str, Placed]
    by: object = None


@dataclass(frozen=True)
class _State:
    """Everything that decides how the patches act; it is replaced as a whole."""

    attached: Mapping[str, _Attached] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: bool = False
    disabled: frozenset[object] = frozenset()

    def updates(self, module: str) -> Placed:
        """What acts on a module, in order."""
        acting = () if self.disabled else self.active
        return tuple(update for name in acting for update in self.attached[name].chains.get(module, ()))


class PatchStack:
    """The patches on one model. Several of them act as if merged one after the other, in the order of `active`.

    Patches may be attached, switched and taken off while other threads run the model: each pass, and each `generate`,
    is wholly of one version (`patchkit.patch.passes`; docs/trust.md says what is not safe). Whatever raises, an
    interrupt included, leaves all as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = lock_of(model)
        self._passes = Passes(model, self._lock)
        self._touched: dict[str, PatchedModule] = {}
        self._state = _State()

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
        return {name: attached.manifest for name, attached in self._state.attached.items()}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active patches, in the order in which they act."""
        return self._state.active

    @property
    def merged(self) -> bool:
        """Whether the active patches are written into the weights."""
        return self._state.merged

    def __repr__(self) -> str:
        state = self._state
        mode = "merged" if state.merged else "attached"
        return f"PatchStack({', '.join(state.attached)}; active: {', '.join(state.active) or 'none'}; {mode})"

    def load(
        self,
        patch: str | Path | Patch,
        name: str | None = None,
        *,
        merged: bool = False,
        force: bool = False,
        by: object = None,
    ) -> None:
        """Add a patch on top of the active ones; arguments and errors as in `patchkit.load`.

        Args:
            by: noted with the patch, for who attaches it to know it by.
        """
        name, read = name or name_of(patch), opened(patch)
        with self._lock:
            if (there := self._there()) is not self:
                return there.load(read, name, merged=merged, force=force, by=by)
            state, merged = self._state, merged or self._state.merged
            for other, attached in state.attached.items():
                if attached.manifest.digest == read.manifest.digest:
                    raise InputError(f'patch "{name}": the model has it already, as "{other}"; it can act only once')
            if name in state.attached:
                raise InputError(f'patch "{name}": the model has one of that name; give this one another, name="..."')
            modules = self._modules(read)
            check_base(read, modules, numbers=not force)
            touched = {modules[weight].place.name: modules[weight].place for weight in read.updates}
            chains, quantized = dict[str, Placed](), quantized_with(self._model)
            for weight, chain in read.updates.items():
                where = modules[weight].place.name
                made = made_for(read, weight, chain, modules[weight], quantized)
                chains[where] = (*chains.get(where, ()), *modules[weight].placed(made))
            all_attached = {**state.attached, name: _Attached(read.manifest, chains, by)}
            self._become(replace(state, attached=all_attached, active=(*state.active, name), merged=merged), touched)

    def _there(self) -> PatchStack:
        """The stack with the model's patches: another one than this where another thread was first to attach any."""
        found = self._model.__dict__.get(_ATTRIBUTE, self)
        assert isinstance(found, PatchStack)
        return found

    def _modules(self, patch: Patch) -> dict[str, PatchedWeight]:
        """The module of every weight of the patch's base, by the weight's name on disk."""
        base, found = patch.manifest.base, dict[str, PatchedWeight]()
        experts = expert_places(self._model) if isinstance(self._model, PreTrainedModel) else {}
        made = dict[str, PatchedExperts]()
        for weight in {**base.weights, **patch.updates}:
            if experts and (known := matching(weight, experts)):
                name, parameter, expert = experts[known[0]]
                place = self._touched.get(name) or made.get(name) or self._experts(name, parameter, weight, base.advice)
                assert isinstance(place, PatchedExperts)
                found[weight], made[name] = PatchedExpert(place, expert), place
                continue
            name, module = find_module(self._model, weight, base.advice)
            found[weight] = self._touched.get(name) or PatchedModule(name, module, self._passes)
        return found

    def _experts(self, name: str, parameter: str, weight: str, advice: str) -> PatchedExperts:
        experts = experts_of(self._model, name)
        if experts.parameter != parameter:
            raise InputError(f"{weight}: not an output projection in {type(self._model).__name__}; {advice}")
        return PatchedExperts(experts, self._passes)

    @contextmanager
    def attached(self, patch: Patch) -> Iterator[nn.Module]:
        """Inside the block, `patch` acts on top of the active ones, for all threads.

        Raises:
            InputError: as in `patchkit.load`, or inside `disable`, where it would not act.
        """
        if self._state.disabled:
            raise InputError("the model's patches are disabled, and one attached now would be, too; attach it before")
        name, mine = f"attached {patch.manifest.digest[:12]}", object()
        try:
            self.load(patch, name, by=mine)
            yield self._model
        finally:
            with self._lock:  # the block may have taken all patches off, and others attached it since
                stack = self._there()
                if (there := stack._state.attached.get(name)) and there.by is mine:
                    stack.delete(name)

    def set_active(self, names: str | Iterable[str]) -> None:
        """Activate just these patches, in this order; the others stay attached but inactive.

        Raises:
            InputError: there is no such patch on the model, one is named twice, or two have rewritten the same neuron.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names)
        with self._lock:
            for name in chosen:
                self._require(name)
            if len(set(chosen)) < len(chosen):
                raise InputError(f"{', '.join(chosen)}: a patch is named twice; it can act only once")
            self._become(replace(self._state, active=chosen))

    @contextmanager
    def disable(self) -> Iterator[nn.Module]:
        """Inside the block, the model is its base again, for all threads."""
        mine = object()
        try:
            with self._lock:
                self._become(replace(self._state, disabled=self._state.disabled | {mine}))
            yield self._model
        finally:
            with self._lock:
                self._become(replace(self._state, disabled=self._state.disabled - {mine}))

    def delete(self, name: str) -> None:
        """Take one patch off the model.

        Raises:
            InputError: it is not there.
        """
        with self._lock:
            self._require(name)
            left = {other: attached for other, attached in self._state.attached.items() if other != name}
            active = tuple(other for other in self._state.active if other != name)
            self._become(replace(self._state, attached=left, active=active))

    def merge(self) -> None:
        """Write the active patches into the weights, and keep the originals in memory on the CPU.

        There is no overhead then. Each weight is rounded to nearest in its dtype: in 16 bits that loses part of a
        small delta, which attached patches keep; so does `patchkit merge`, which rounds with error feedback. Not for a
        model that other threads run meanwhile: weights are written one after the other.

        Raises:
            InputError: a weight is quantized or offloaded.
        """
        with self._lock:
            self._become(replace(self._state, merged=True))

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and let the active patches act by hooks again."""
        with self._lock:
            self._become(replace(self._state, merged=False))

    def unload(self) -> nn.Module:
        """Take all patches off: weights bit for bit as they were, no hooks. Returns the model."""
        with self._lock:
            self._become(replace(self._state, attached={}, active=(), merged=False))
        return self._model

    def merge_and_unload(self) -> nn.Module:
        """Leave the active patches in the weights for good, with no hooks and no originals. Returns the model.

        Raises:
            InputError: a weight is quantized or offloaded.
        """
        with self._lock, uninterrupted():
            self.merge()
            for place in self._touched.values():
                place.keep()
            return self.unload()

    def _require(self, name: str) -> None:
        if name not in self._state.attached:
            known = ", ".join(self._state.attached) or "none at all"
            raise InputError(f'patch "{name}": not on this model; it has {known}')

    # --- from one state to another ------------------------------------------------------------------------------------

    def _become(self, state: _State, more: Mapping[str, PatchedModule] = MappingProxyType({})) -> None:
        """Let the patches act as `state` says, or leave all as it was. `more` are modules not touched before.

        Raises:
            InputError: weights are to be written that cannot be, or active patches have rewritten the same neuron.
        """
        touched, before = {**self._touched, **more}, self._state
        refuse_shared_neurons({name: state.attached[name].manifest for name in state.active})
        for place in touched.values() if state.merged else ():
            place.check_writable()
        totals = {name: place.total(state.updates(name)) for name, place in touched.items()}
        acting = (
            {} if state.merged else {name: LiveDelta.of(total) for name, total in totals.items() if total is not None}
        )
        written = {name: place.written for name, place in touched.items()}
        version = self._passes.current
        try:
            self._put(state, touched, acting, totals if state.merged else {})
        except BaseException:
            with uninterrupted():
                self._put(before, touched, version, written)
            raise

    def _put(
        self,
        state: _State,
        touched: Mapping[str, PatchedModule],
        acting: Version,
        written: Mapping[str, Delta | None],
    ) -> None:
        """Bring hooks, weights and notes in line with a state, when all that it takes has been computed."""
        with uninterrupted():
            used = {name for attached in state.attached.values() for name in attached.chains}
            self._touched = dict(touched)
            if state.attached:
                self._passes.watch(used)
                setattr(self._model, _ATTRIBUTE, self)
            hooked = [name for name in used if touched[name].hook()]
            for name, place in touched.items():
                place.write(written.get(name))
            self._passes.current, self._state = acting, state
            if not state.attached and self._model.__dict__.get(_ATTRIBUTE) is self:
                delattr(self._model, _ATTRIBUTE)
            self._passes.leave(
                {name: partial(self._unhook, name) for name in touched.keys() - used}, not state.attached
            )
            if hooked:
                reset_compiled()

    def _unhook(self, name: str) -> None:
        """Forget a module."""
        self._touched.pop(name).unhook()
        reset_compiled()

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model, which no thread runs yet; they have a lock of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = lock_of(self._model)
        self._passes.take(self._lock)


def opened(patch: str | Path | Patch) -> Patch:
    """The patch itself, read where a folder is given."""
    return patch if isinstance(patch, Patch) else Patch.load(patch)


def name_of(patch: str | Path | Patch) -> str:
    """What a patch is called where nobody names it: as its folder."""
    return "patch" if isinstance(patch, Patch) else Path(patch).absolute().name
