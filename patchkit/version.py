"""The version of patchkit, whose distribution has another name: on the package index, patchkit is another project."""

from __future__ import annotations

from importlib import metadata

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
