"""What patchkit raises. The command line prints the message as one line and exits with the class's status."""

from __future__ import annotations

import re
from threading import Event


class PatchkitError(Exception):
    """Anything patchkit refuses to do, in one line: what, where, what to do. The other errors are kinds of it.

    Attributes:
        exit_status: what the command line exits with, 1 here.

    Examples:
        >>> issubclass(patchkit.InputError, patchkit.PatchkitError)
        True
    """

    exit_status = 1

    def __str__(self) -> str:
        """The message; of a line that a file's own text makes too long, the beginning, and the end with the advice."""
        return "\n".join(_shortened(line) for line in super().__str__().splitlines())


_LONGEST_LINE, _LONGEST_WORD, _END = 1000, 200, 0.3


def _shortened(line: str) -> str:
    return _cut(re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: _cut(word[0], _LONGEST_WORD), line), _LONGEST_LINE)


def _cut(text: str, most: int) -> str:
    """Its beginning and its end, with how much is left out between them, where it is longer than `most`."""
    left_out, end = len(text) - most, int(_END * most)
    return f"{text[: most - end]} [{left_out:,} characters] {text[-end:]}" if left_out > 0 else text


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


def given_twice(option: str, other: str) -> InputError:
    """The error where a second option says what an earlier one, `other`, has said already: neither is silently left
    out."""
    return InputError(f"{option}: says the same thing as {other}, which was given before it; leave one of them out")


class GateError(PatchkitError):
    """A bound on what was measured does not hold; the message names all that do not. Exit status 1.

    Examples:
        With `report` as `patchkit.measure` returns it:

        >>> from patchkit.evaluate.gates import Gates
        >>> try:
        ...     Gates({"perplexity_ratio": 0.5}).check(report)
        ... except patchkit.GateError as error:
        ...     print(error)
        gate failed: perplexity ratio ..., asked for at most 0.5
    """


CTRL_C = Event()
"""Set once Ctrl-C was pressed: compiled modules that are interrupted while they are imported raise errors of their own,
which do not say what they came of."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a point where more is to be said than that the same command goes on."""


_NO_MEMORY = (
    "could not create a primitive",  # oneDNN
    "could not create a memory",
    "DefaultCPUAllocator",
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",  # cuBLAS and its kin
)
_NO_DISK = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 122")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, whichever library noticed it, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _NO_MEMORY)


def shortage(error: BaseException) -> str | None:
    """One line where memory or the disk ran out, and what to do; None for any other error."""
    if out_of_memory(error):
        advice = "free some, use a machine with more, or take a smaller --dtype, value.parallel or batch_size"
        return f"not enough memory: {advice}"
    line = " ".join(str(error).split())
    if any(text in line for text in _NO_DISK):
        return f"the disk is full, or a limit of it is reached: {line[:300]}"
    return None
