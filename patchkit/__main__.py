"""`python -m patchkit`, and the program `patchkit`: from here on Ctrl-C is one line, while importing, too."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from patchkit.errors import CTRL_C

if TYPE_CHECKING:
    from types import FrameType

_LINE = b"interrupted; run the same command again\n"


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _first)
    sys.unraisablehook = _unraisable
    try:
        from patchkit.cli import main as run

        run()
    except KeyboardInterrupt:  # before the command line could say more of it, or while it said so
        _end()
    except Exception:
        if CTRL_C.is_set():  # what a compiled module makes of an interrupt while it is imported
            _end()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to tell or to keep


def _first(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, lambda *_: _end())  # who asks twice does not want to wait for anything
    CTRL_C.set()
    raise KeyboardInterrupt


def _unraisable(problem: Any) -> None:
    """Of what is raised where nothing can be, such as in a finalizer, an interrupt would be swallowed."""
    if isinstance(problem.exc_value, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(problem)


def _end() -> NoReturn:
    os.write(2, _LINE)
    os._exit(130)


if __name__ == "__main__":
    main()
