"""One lock per model, and work that Ctrl-C waits for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_NEW = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """The lock of a model, the same one for as long as the model lives; its own thread may take it again."""
    with _NEW:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside the block is raised at its end."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came = list[tuple[int, FrameType | None]]()
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
