"""The folder that statistics of text are kept in: found by what made them, verified when loaded, resumed when cut off.

    <root>/<token ids>-<tokens>x<window>-<dtype>/<weight>.<kind>-<key>.safetensors
    <root>/<token ids>-<tokens>x<window>-<dtype>/partial-<key>.safetensors

Names are for people. What a file holds stands in its header: the `Origin`, of which the key is a digest, and a checksum
over it and all tensors.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from patchkit.errors import InputError
from patchkit.io.checked import Damaged, read_checked, write_checked
from patchkit.io.checkpoint import StoredTensor, read_metadata
from patchkit.io.files import remove_left
from patchkit.io.places import cache_folder
from patchkit.ranks import Ranks, world
from patchkit.statistics.corpus import TextRecord

Kind = Literal["second_moments", "leading_eigenvectors", "text_gradient", "text_curvature", "spare_neurons"]
Tensors = Mapping[str, Tensor]
_VERSION = 2
"""Of how statistics are computed and stored; those of other versions are computed again."""
_ABANDONED = 7 * 24 * 3600.0
"""Seconds after which a partial file that nobody went on from is removed."""


class Origin(BaseModel):
    """Everything that made the statistics of one weight.

    model: digest of all weights that they depend on. dtype: what the pass was computed in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    weight: str
    layer: int
    model: str
    dtype: str
    text: TextRecord
    version: int = _VERSION

    @property
    def key(self) -> str:
        """sha256 over all of it but the name of the text's file."""
        return hashlib.sha256(self.model_dump_json(exclude={"text": {"source"}}).encode()).hexdigest()

    @property
    def file(self) -> Path:
        """Where it is kept, below the store's root."""
        text = self.text
        folder = f"{str(text.token_ids)[:16]}-{text.tokens}x{text.window}-{self.dtype}"
        return Path(folder) / f"{self.weight}.{self.kind}-{self.key[:16]}.safetensors"


@dataclass(frozen=True)
class Entry:
    """A file of the store, by its header."""

    file: Path
    origin: Origin

    def verified(self) -> dict[str, StoredTensor]:
        """Its tensors, still on disk, once the checksum has been verified; one chunk at a time is in memory.

        Raises:
            Damaged: the file holds something else than what was written.
        """
        return read_checked(self.file)[1]


class Partial:
    """The unfinished sums of one computation, or of one process's part of it, which the next one goes on from."""

    def __init__(self, root: Path, origins: Sequence[Origin], ranks: Ranks) -> None:
        names = sorted(str(origin.file) for origin in origins)
        self._made = "\n".join(names)
        part = "" if ranks.size == 1 else f"{ranks.rank} of {ranks.size}"
        key = hashlib.sha256(f"{self._made}{part}".encode()).hexdigest()[:16]
        self.file = (root / names[0]).with_name(f"partial-{key}.safetensors")

    def load(self) -> tuple[dict[str, Tensor], int]:
        """The sums, and how many batches are in them: none of either where there is no usable file."""
        if not self.file.is_file():
            return {}, 0
        try:
            notes, stored = read_checked(self.file)
            return {name: tensor.read() for name, tensor in stored.items()}, int(notes["done"])
        except Damaged as error:
            _tell_damaged(error)
            return {}, 0

    def save(self, sums: Tensors, done: int) -> None:
        """Write the sums of the first `done` batches."""
        write_checked(self.file, sums, {"done": str(done), "files": self._made})

    def remove(self) -> None:
        """Forget them."""
        self.file.unlink(missing_ok=True)


Sound = Callable[[Tensors], bool]
"""Whether tensors can be the statistics that they are said to be."""
Compute = Callable[[Sequence[int], Partial], Iterable[tuple[int, Tensors]]]
"""(layers, partial) -> for each of the layers its statistics."""


class StatisticsStore:
    """Statistics of models on texts in a folder, by default the one in the user's cache."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root else cache_folder() / "stats"

    def entries(self, kind: Kind) -> Iterator[Entry]:
        """All statistics of one kind by their headers; what is not of this version of the store is passed over."""
        for file in sorted(self.root.rglob(f"*.{kind}-*.safetensors")):
            origin = None if file.parent.name.startswith(".") else _origin_in(file)  # which are being written
            if origin is not None:
                yield Entry(file, origin)

    def has(self, origin: Origin) -> bool:
        """Whether there is a file of the statistics that `origin` made; it is not read."""
        return (self.root / origin.file).is_file()

    def load(self, origin: Origin, sound: Sound = lambda tensors: True) -> dict[str, Tensor] | None:
        """The statistics that `origin` made; None where they are not there, or damaged, which a warning says."""
        file = self.root / origin.file
        if not file.is_file():
            return None
        try:
            notes, stored = read_checked(file)
            if Origin.model_validate_json(notes["origin"]).key != origin.key:
                raise Damaged(f"{file}: statistics of something else")
            tensors = {name: tensor.read() for name, tensor in stored.items()}
            if not sound(tensors):
                raise Damaged(f"{file}: no statistics can be so; damaged")
            return tensors
        except (Damaged, KeyError, ValidationError) as error:
            _tell_damaged(error)
            return None

    def save(self, origin: Origin, tensors: Tensors) -> None:
        """Keep the statistics that `origin` made."""
        write_checked(self.root / origin.file, tensors, {"origin": origin.model_dump_json()})

    def get(
        self, wanted: Mapping[int, Origin], compute: Compute, sound: Sound = lambda tensors: True
    ) -> dict[int, Tensors]:
        """Statistics by layer: those that are there and `sound`, and what `compute` gives for the others.

        `compute` runs under a lock, so that of two commands that want the same, one waits and takes what the other
        made. All of `wanted` are of one text and dtype. Of processes that do one command together, the first one reads
        and writes, and all compute.
        """
        ranks = world()
        if ranks.size == 1:
            return self._get(wanted, compute, sound)
        found, partials = dict[int, Tensors](), list[Partial]()

        def compute_together(missing: Sequence[int], partial: Partial) -> Iterable[tuple[int, Tensors]]:
            partials.append(partial)
            ranks.from_first(lambda: missing)
            return compute(missing, partial)

        if ranks.first:
            found = self._get(wanted, compute_together, sound)
            if not partials:  # nothing is missing
                ranks.from_first(tuple[int, ...])
        elif missing := ranks.from_first(tuple[int, ...]):
            partials.append(Partial(self.root, [wanted[layer] for layer in missing], ranks))
            for _ in compute(missing, partials[0]):
                pass
        whole = {layer: ranks.tensors_from_first(found.get(layer)) for layer in wanted}
        for partial in partials:  # what came of them is written now
            partial.remove()
        return whole

    def _get(self, wanted: Mapping[int, Origin], compute: Compute, sound: Sound) -> dict[int, Tensors]:
        found = self._load_all(wanted, sound)
        for origin in wanted.values():
            remove_left((self.root / origin.file).parent)
        if len(found) < len(wanted):
            folder = (self.root / next(iter(wanted.values())).file).parent
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                found |= self._load_all({layer: wanted[layer] for layer in wanted.keys() - found.keys()}, sound)
                missing = [layer for layer in wanted if layer not in found]
                if missing:
                    partial = Partial(self.root, [wanted[layer] for layer in missing], world())
                    for layer, tensors in compute(missing, partial):
                        self.save(wanted[layer], tensors)
                        found[layer] = tensors
                    partial.remove()
                self._remove_leftovers(folder)
        return {layer: found[layer] for layer in wanted}

    def _load_all(self, wanted: Mapping[int, Origin], sound: Sound) -> dict[int, Tensors]:
        loaded = {layer: self.load(origin, sound) for layer, origin in wanted.items()}
        return {layer: tensors for layer, tensors in loaded.items() if tensors is not None}

    def _remove_leftovers(self, folder: Path) -> None:
        """What killed processes left: sums that were finished otherwise, or that nobody went on from."""
        for file in folder.glob("partial-*.safetensors"):
            try:
                names = read_metadata(file)["files"].splitlines()
                done = all((self.root / name).is_file() for name in names)
            except (InputError, KeyError):
                done = True
            if done or time.time() - file.stat().st_mtime > _ABANDONED:
                file.unlink(missing_ok=True)


def _origin_in(file: Path) -> Origin | None:
    try:
        return Origin.model_validate_json(read_metadata(file)["origin"])
    except (InputError, KeyError, ValidationError):
        return None


def _tell_damaged(error: Exception) -> None:
    warnings.warn(f"{error}; computed again", stacklevel=2)
