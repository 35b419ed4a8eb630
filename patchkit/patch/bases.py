"""Where a patch's base lies on this machine, which is nobody else's business and no stranger's to say.

A manifest names a folder by its last part, "./llama". Where that folder is, the user's cache keeps by the digests of
the weights: <cache>/bases/<key>. A path that somebody else wrote into a manifest is never followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath, PureWindowsPath

from patchkit.errors import InputError
from patchkit.io.files import write_atomically
from patchkit.io.places import cache_folder
from patchkit.model.loading import embedded_model


def is_path(name: str) -> bool:
    """Whether a base's name is that of a folder and not of a Hub repository."""
    windows = PureWindowsPath(name)
    return name.startswith((".", "/", "~")) or bool(windows.drive) or "\\" in name or name.count("/") > 1


def public_name(name: str) -> str:
    """The name as a manifest has it: of a folder only the last part, "./llama"."""
    if not is_path(name):
        return name
    last = PureWindowsPath(name).name if "\\" in name or PureWindowsPath(name).drive else PurePath(name).name
    return f"./{last}"


def public_argument(argument: str) -> str:
    """An argument of a command line as others may see it: of a path that leads from the root only the last part."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    rooted = value.startswith(("/", "~")) or bool(PureWindowsPath(value).drive)
    return option + equals + public_name(value) if rooted else argument


def remember(name: str, weights: Mapping[str, str]) -> None:
    """Note where the model with these weights (digests by on-disk name) is, if `name` is a folder here."""
    if not weights or not Path(name).is_absolute() or not Path(name).exists() or _noted(weights) == name:
        return
    with suppress(OSError):  # a cache that cannot be written: the user will have to name the base
        write_atomically(_place(weights), lambda file: _write(file, name))


def known_here(name: str, weights: Mapping[str, str]) -> str:
    """The folder that was noted for these weights, if it is there and has that name, or the model that comes with
    patchkit; else the public name."""
    public = public_name(name)
    folders = (_noted(weights), str(embedded_model())) if is_path(name) else ()
    there = (folder for folder in folders if folder and public_name(folder) == public and Path(folder).exists())
    return next(there, public)


def is_known(name: str) -> bool:
    """Whether a base's name leads anywhere: to the Hub, or to a folder that was noted here."""
    return bool(name) and (not is_path(name) or Path(name).is_absolute())


def base_to_load(name: str, option: str = "--model") -> str:
    """The name of a manifest's base, once it is sure that it leads to the Hub or to a folder noted here.

    Args:
        option: by what the user names another one.

    Raises:
        InputError: it is a folder's name, and not known here.
    """
    if name and not is_known(name):
        raise InputError(
            f"the patch was made from a folder called {PurePath(name).name}, which is not known here; name its base "
            f"with {option}"
        )
    if not name:
        raise InputError(f"the patch does not name its base, which was made in memory; name it with {option}")
    if not is_path(name) and Path(name).exists():
        raise InputError(
            f"base model {name}: there is a folder of that name here, and the patch means a repository on the Hub; say "
            f"which with {option}, ./{name} being the folder"
        )
    return name


def _place(weights: Mapping[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(sorted(weights.items())).encode()).hexdigest()
    return cache_folder() / "bases" / key[:32]


def _noted(weights: Mapping[str, str]) -> str | None:
    try:
        return _place(weights).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _write(file: Path, name: str) -> None:
    file.write_text(name, encoding="utf-8")
