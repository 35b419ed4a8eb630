"""What patchkit raises. The command line prints the message as one line and exits with the class's status."""

from __future__ import annotations


class PatchkitError(Exception):
    """Anything patchkit refuses to do, in one line: what, where, what to do. Exit status 1."""

    exit_status = 1


class InputError(PatchkitError):
    """Bad input: a fact file, a recipe, a model that cannot be edited, a patch for another base. Exit status 2."""

    exit_status = 2


class GateError(PatchkitError):
    """A quality gate of `patchkit verify` did not hold. Exit status 1."""
