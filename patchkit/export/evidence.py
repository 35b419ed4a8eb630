"""What people look at before they use a patch, as files of its repository: a page, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patchkit.patch.manifest import Manifest

PAGE = "report.html"
FOLDER = "report"


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what is to be seen on it in one sentence."""

    name: str
    says: str
    png: bytes


@dataclass(frozen=True)
class Evidence:
    """The page and the pictures. missing: why there are no pictures, None where there are."""

    page: bytes
    pictures: tuple[Picture, ...]
    missing: str | None = None

    @property
    def files(self) -> dict[str, bytes]:
        """By name in the repository."""
        return {PAGE: self.page, **{f"{FOLDER}/{each.name}": each.png for each in self.pictures}}


Look = Callable[[Path, Manifest, str], Evidence]
"""(a patch's folder, its manifest, its name) -> what there is to see of it."""


def is_shown(name: str) -> bool:
    """Whether a file of a patch's repository is the page, or a picture that an earlier push has put there."""
    return name == PAGE or (name.startswith(f"{FOLDER}/") and name.endswith(".png"))
