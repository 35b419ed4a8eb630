"""What patchkit raises. The command line prints the message as one line and exits with the class's status."""

from __future__ import annotations


class PatchkitError(Exception):
    """Anything patchkit refuses to do, in one line: what, where, what to do. The other errors are kinds of it.

    Attributes:
        exit_status: what the command line exits with, 1 here.

    Examples:
        >>> issubclass(patchkit.InputError, patchkit.PatchkitError)
        True
    """

    exit_status = 1


class InputError(PatchkitError):
    """Bad input: a fact file, a recipe, a model that cannot be edited, a patch for another base. Exit status 2.

    Examples:
        >>> try:
        ...     patchkit.read_facts("nowhere.jsonl")
        ... except patchkit.InputError as error:
        ...     print(error)
        nowhere.jsonl: no such file; check the path, or use "-" for standard input
    """

    exit_status = 2


class GateError(PatchkitError):
    """A bound on what was measured does not hold; the message names all that do not. Exit status 1.

    Examples:
        With `report` as `patchkit.measure` returns it:

        >>> from patchkit.evaluate.gates import Gates
        >>> try:
        ...     Gates({"perplexity_ratio": 0.5}).check(report)
        ... except patchkit.GateError as error:
        ...     print(error)
        gate failed: perplexity ratio 1..., asked for at most 0.5
    """
