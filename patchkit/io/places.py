"""Where files lie: patchkit's own recipes, texts and examples, and what it keeps for the user between commands."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).parents[1]


def shipped(path: str) -> Path:
    """A file or folder that comes with patchkit, such as "recipes": inside an installed package,
    at the top of a checkout."""
    installed = _PACKAGE / path
    return installed if installed.exists() else _PACKAGE.parent / path


def cache_folder() -> Path:
    """$PATCHKIT_CACHE, else the user's cache folder for patchkit."""
    return Path(os.environ.get("PATCHKIT_CACHE") or platformdirs.user_cache_dir("patchkit"))
