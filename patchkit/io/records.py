"""What is written as JSON beside weights: records that cannot be changed and have no field that is not theirs."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from patchkit.io.files import write_atomically


class FrozenRecord(BaseModel):
    """One record, or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def write(self, file: Path) -> None:
        """The record as a file, which appears whole or not at all."""
        write_atomic_text(file, self.model_dump_json(indent=1) + "\n")


def write_atomic_text(file: Path, text: str) -> None:
    """A text as a file, which appears whole or not at all."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_atomically(file, write)
