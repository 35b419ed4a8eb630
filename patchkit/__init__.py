"""patchkit: patch facts into open-weight language models, as small, revertible artifacts with provenance."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchkit.errors import GateError, InputError, PatchkitError

if TYPE_CHECKING:
    from patchkit.api import apply, measure, revert
    from patchkit.facts.reader import read_facts
    from patchkit.facts.schema import Fact, Locality
    from patchkit.patch.patch import Patch
    from patchkit.patch.pretrained import from_pretrained
    from patchkit.patch.stack import load

__all__ = [
    "Fact",
    "GateError",
    "InputError",
    "Locality",
    "Patch",
    "PatchkitError",
    "apply",
    "from_pretrained",
    "load",
    "measure",
    "read_facts",
    "revert",
]

# torch and transformers take seconds to import; `patchkit --help` and reading facts need neither. What comes before
# the program's own handling of Ctrl-C is to be next to nothing.
_LAZY = {
    "Fact": "patchkit.facts.schema",
    "Locality": "patchkit.facts.schema",
    "read_facts": "patchkit.facts.reader",
    "apply": "patchkit.api",
    "Patch": "patchkit.patch.patch",
    "measure": "patchkit.api",
    "revert": "patchkit.api",
    "load": "patchkit.patch.stack",
    "from_pretrained": "patchkit.patch.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'patchkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
