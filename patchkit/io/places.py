"""Where patchkit's own recipes, texts and examples lie: inside an installed package, at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped(path: str) -> Path:
    """A file or folder that comes with patchkit, such as "recipes" or "examples/factworld"."""
    installed = _PACKAGE / path
    return installed if installed.exists() else _PACKAGE.parent / path
