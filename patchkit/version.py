"""The version of patchkit, whose distribution has another name: on the package index, patchkit is another project."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from patchkit.errors import InputError

DISTRIBUTION = "patchkit-lm"


def patchkit_version() -> str:
    """The version of the installed distribution, which manifests and cards record.

    Raises:
        InputError: patchkit is imported from a folder and not installed, so that nothing says which version it is.
    """
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise InputError(
            f"the distribution {DISTRIBUTION} is not installed, so that the version of patchkit is unknown; "
            "run pip install -e . in its checkout"
        ) from None


def project_page() -> str | None:
    """The project's own page, where the distribution names one: `Homepage` under `project.urls`."""
    try:
        named = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    pages = dict(entry.split(", ", 1) for entry in named if ", " in entry)
    return pages.get("Homepage")


def stamp(**more: str) -> dict[str, Any]:
    """When and with what a run of a patch's history was made, `more` being further versions."""
    import torch
    import transformers

    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "patchkit": patchkit_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **more,
        },
    }
