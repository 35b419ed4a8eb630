"""The state of a value optimization on disk, while it goes on."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from patchkit.io.checked import Damaged, read_checked, write_checked

SHARE = 20
"""A log is written at most every so many times the time that writing it takes."""
AT_FIRST = 0.05
"""Seconds that writing is reckoned to take before it has been done."""


class ValueLog:
    """What one call of `optimize` writes now and then, to go on from after a kill; without a file, nothing.

    Attributes:
        retired: by the number of steps done, the facts that were still active where some had finished.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.retired = file, dict[int, list[int]]()
        self._next = time.monotonic() + SHARE * AT_FIRST

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.file is not None and time.monotonic() >= self._next

    def keep(self, tensors: dict[str, Tensor], **numbers: Any) -> None:
        """Write the state: tensors, and numbers of any kind that JSON has."""
        assert self.file is not None
        began = time.monotonic()
        try:
            write_checked(self.file, tensors, {"numbers": json.dumps({**numbers, "retired": self.retired})})
        except OSError as error:
            warn_of_loss(error)
            self.file = None
        ended = time.monotonic()
        self._next = ended + SHARE * (ended - began)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep` wrote last; None where there is nothing, or something damaged."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            notes, stored = read_checked(self.file)
        except Damaged:
            return None
        numbers = json.loads(notes["numbers"])
        self.retired = {int(step): facts for step, facts in numbers.pop("retired").items()}
        return {name: tensor.read() for name, tensor in stored.items()}, numbers


def warn_of_loss(error: OSError) -> None:
    """Say that a run goes on, but not from here if it is cut off: the disk of the cache is not that of the patch."""
    warnings.warn(f"what is finished cannot be kept, a kill would lose it: {error}", stacklevel=3)
