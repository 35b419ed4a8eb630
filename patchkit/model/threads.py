"""Hooks for one thread: a model may be run by others while patchkit reads, edits or measures it in this one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, which does nothing in any other thread than the one that calls this now."""
    own = threading.get_ident()

    @functools.wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == own else None

    return called


def forward_in_this_thread(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` for `module` that is `forward` in this thread, and in any other the one that the module has now."""
    own, others = threading.get_ident(), module.__dict__.get("forward")

    def called(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == own:
            return forward(*args, **kwargs)
        return others(*args, **kwargs) if others else type(module).forward(module, *args, **kwargs)

    return called
