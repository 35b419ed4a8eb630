"""Which patches each pass through a model sees, while other threads attach patches and take them off.

A pass, or a whole `generate`, sees one version of the patches from its beginning to its end: it takes it when it enters
the model, and the hooks on the patched modules ask for the version of the thread that runs them. Patches come and go by
putting another version in the place of the current one, in one step; nobody waits. A pass that was under way when the
first patch came, and so entered through no gate, is recognized by its thread's stack, and goes on without patches.

Compiled code has no version of its own: it sees the current one.
"""

from __future__ import annotations

import faulthandler
import functools
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from patchkit.model.hooks import LiveDelta

Version = Mapping[str, LiveDelta]
"""By name of a module, what is added to its output; a version is never changed."""
NOTHING: Version = {}
_RUNNING = ("generate", "forward", "_call_impl", "_wrapped_call_impl")
"""What a model's methods are called that run it."""


@dataclass(frozen=True)
class _Pin:
    """The version that a thread's pass sees. lasting: through all passes until whoever made it ends it. frame: of the
    pass or the `generate` that was under way when the gate was put up; the pin holds while it is on the stack."""

    version: Version
    lasting: bool = False
    frame: FrameType | None = None

    @property
    def holds(self) -> bool:
        """Whether a pass that begins now, in its thread, is a part of what it was made for."""
        return self.lasting or (self.frame is not None and _is_on_stack(self.frame))


class Passes:
    """The passes through one model. All that changes hooks is called with the model's lock held."""

    def __init__(self, model: nn.Module, lock: Any) -> None:
        self.current = NOTHING
        self._model, self._lock = model, lock
        self._pins = dict[int, _Pin]()  # by thread, each of which touches none but its own
        self._unhook = dict[str, Callable[[], None]]()  # what is still to be called, by module
        self._closing = False
        self._generating = set[int]()  # threads that were in a `generate` when the gate was put up

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model, which no thread runs yet."""
        return {**self.__dict__, "_pins": {}, "_lock": None}

    def take(self, lock: Any) -> None:
        """Give a copy the lock of its own model."""
        self._lock = lock

    def acting(self) -> Version:
        """The version that the pass in this thread sees."""
        if torch.compiler.is_compiling():
            return self.current
        me = threading.get_ident()
        pin = self._pins.get(me)
        if pin is not None and (pin.frame is None or pin.holds):
            return pin.version
        frame = _outermost(self._model, _RUNNING)  # else it runs a module by itself, and not the model
        if frame is None:
            self._pins.pop(me, None)
            return self.current
        self._pins[me] = _Pin(NOTHING, frame=frame)
        return NOTHING

    @contextmanager
    def seeing(self, version: Version) -> Iterator[None]:
        """Inside the block, this thread sees `version`, in however many passes."""
        me = threading.get_ident()
        outer = self._pins.get(me)
        self._pins[me] = _Pin(version, lasting=True)
        try:
            yield
        finally:
            if outer is None:
                self._pins.pop(me, None)
            else:
                self._pins[me] = outer
            self._settle_unless_busy()

    # --- the gate -----------------------------------------------------------------------------------------------------

    def watch(self, modules: Iterable[str]) -> None:
        """Keep the hooks on these modules, and put up the gate, if it is not there."""
        self._unhook = {name: unhook for name, unhook in self._unhook.items() if name not in set(modules)}
        self._closing = False
        if self._enter in self._model._forward_pre_hooks.values() and self._exit in self._model._forward_hooks.values():
            return
        self._open()
        self._model.register_forward_pre_hook(self._enter, prepend=True)
        self._model.register_forward_hook(self._exit, always_call=True)
        if callable(getattr(self._model, "generate", None)) and "generate" not in self._model.__dict__:
            self._model.__dict__["generate"] = functools.partial(_generate, self)
        self._generating = _threads_in("generate")

    def leave(self, unhook: Mapping[str, Callable[[], None]], closing: bool) -> None:
        """Call what takes the hooks off some modules, by name, each now or when no pass sees a version any more that
        has something for the module; with `closing`, the gate goes with the last of them."""
        self._unhook, self._closing = {**self._unhook, **unhook}, closing
        pin = self._pins.get(threading.get_ident())
        if pin is not None and not pin.holds:  # of a pass in this thread that Ctrl-C has ended
            self._pins.pop(threading.get_ident())
        self._settle()

    def _settle(self) -> None:
        for thread in self._pins.keys() - sys._current_frames().keys():
            self._pins.pop(thread, None)
        versions = [pin.version for pin in list(self._pins.values())]
        for name in list(self._unhook):
            if not any(name in version for version in versions):
                self._unhook.pop(name)()
        if self._closing and not any(versions):
            self._open()
            self._closing = False

    def _open(self) -> None:
        """Take the gate down."""
        remove_hook(self._model, self._enter)
        remove_hook(self._model, self._exit)
        if getattr(self._model.__dict__.get("generate"), "func", None) is _generate:
            del self._model.__dict__["generate"]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        pin = self._pins.get(me)
        if pin is None or not pin.holds:
            # In a `generate` that did not come by way of `_generate`, all passes see what the first one did: nothing,
            # if it was under way when the gate was put up.
            frame = _outermost(self._model, ("generate",))
            self._pins[me] = _Pin(NOTHING if frame and me in self._generating else self.current, frame=frame)
            self._generating.discard(me)

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        pin = self._pins.get(threading.get_ident())
        if pin is not None and not pin.holds:
            self._pins.pop(threading.get_ident(), None)
        if output is not None:  # where a pass has raised, torch is going through the hooks just now
            self._settle_unless_busy()

    def _settle_unless_busy(self) -> None:
        if (self._unhook or self._closing) and self._lock.acquire(blocking=False):  # else who has the lock will do it
            try:
                self._settle()
            finally:
                self._lock.release()


def _generate(passes: Passes, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, all of whose passes see one version."""
    own = functools.partial(type(passes._model).generate, passes._model)  # type: ignore[attr-defined]
    pin = passes._pins.get(threading.get_ident())
    if pin is not None and pin.holds:
        return own(*args, **kwargs)
    with passes.seeing(passes.current):
        return own(*args, **kwargs)


def _threads_in(name: str) -> set[int]:
    """Threads that are in a function of this name, of whatever module.

    By a dump, which no thread can run in between of: stacks of threads that go on are not to be walked through.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read().decode(errors="replace").split("hread 0x")[1:]
    return {int(stack.split()[0], 16) for stack in stacks if re.search(rf" in {name}$", stack, re.MULTILINE)}


def _outermost(model: nn.Module, names: Sequence[str]) -> FrameType | None:
    """The outermost frame of this thread that runs one of these methods of the model."""
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in names and frame.f_locals.get("self") is model:
            found = frame
        frame = frame.f_back
    return found


def _is_on_stack(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Take a forward hook off a module, if it is on it; done half, it can be done again."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for number in [number for number, there in hooks.items() if there == hook]:
            hooks.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)
            module._forward_hooks_with_kwargs.pop(number, None)


def reset_compiled() -> None:
    """Compiled code does not notice hooks that come and go; what they add, it does."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
