"""The statistics of plain text that a merge rounds by: those of the very model that is merged into, or none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.io.checked import Damaged
from patchkit.io.checkpoint import read_header, stored_tensors
from patchkit.maths.leading import Leading, leading
from patchkit.maths.rounding import TEXT_DIRECTIONS, Spectrum
from patchkit.model.arch import decoder_layers
from patchkit.model.weights import find_weight, same_weight, skeleton
from patchkit.patch.patch import Patch
from patchkit.statistics.corpus import TextRecord
from patchkit.statistics.moments import are_moments, digests_below
from patchkit.statistics.store import Entry, StatisticsStore
from patchkit.words import listed

Spectra = dict[str, tuple[str, Spectrum]]
"""By on-disk name of a weight: the name of the statistics' file, and the part of it that rounding uses."""


def find_spectra(
    weights: Mapping[str, int],
    needed: Collection[str],
    patches: Sequence[Patch],
    base: Path,
    folder: str | Path | None,
    say: Callable[[str], None],
) -> Spectra:
    """The statistics of each of `weights` (on-disk name -> d_in) that has some made with the model in `base`.

    The base's weights below the edited layers are read for that, one at a time. Of several statistics of one weight,
    those of the latest run's text are taken, and of these the ones computed in the widest dtype.

    Args:
        needed: those of `weights` that can have some, and are missed where they have none.
        folder: of a `StatisticsStore`, whatever its text; by default the cache, for the texts of the patches' runs.

    Raises:
        InputError: `folder` was given and does not have one text's statistics of every weight that needs some.
    """
    texts = [run.text for patch in patches for run in reversed(patch.manifest.history)]
    candidates = _candidates(weights, texts, folder)
    right = _of_model(candidates, base) if candidates else []
    found: Spectra = {}
    for weight in weights:
        choices = [each for each in right if same_weight(each.entry.origin.weight, weight)]
        if choices:
            best = min(choices, key=_Candidate.rank)
            others = {each.entry.origin.text.token_ids for each in choices if each.rank()[0] == best.rank()[0]}
            if folder and len(others) > 1:
                raise InputError(f"--stats {folder}: of {len(others)} texts for {weight}, none of them the patch's")
            try:
                found[weight] = (best.entry.file.name, _spectrum(best.entry))
            except Damaged as error:
                say(f"note: {error}; `patchkit stats` computes them again")
    missing = [weight for weight in weights if weight in needed and weight not in found]
    if folder and (lacking := missing or ([] if found else list(weights))):
        what = "those of other models" if candidates and not right else "none"
        raise InputError(f"--stats {folder}: {what} for {lacking[0]}; give one that `patchkit stats` wrote for it")
    if missing:
        say(f"note: no statistics for {listed(missing, 1)}: {_what_to_do(patches)}")
    return found


def _what_to_do(patches: Sequence[Patch]) -> str:
    """What it means that statistics are missing, and where to get them."""
    layers = sorted({layer for patch in patches for run in patch.manifest.history for layer in run.layers})
    where = ",".join(map(str, layers))
    return (
        "rounding keeps the facts, and may change other texts a little more than it has to; to spare them, run "
        f"`patchkit stats --model BASE --layers {where} --out DIR` and merge again with --stats DIR"
    )


@dataclass(frozen=True)
class _Candidate:
    """Stored statistics of one of the weights, and the place of their text among the runs', the latest first."""

    entry: Entry
    place: int

    def rank(self) -> tuple[int, int]:
        """The best has the lowest: the latest run's text, then the widest dtype."""
        return self.place, -torch.finfo(getattr(torch, self.entry.origin.dtype)).bits


def _candidates(weights: Mapping[str, int], texts: Sequence[TextRecord], folder: str | Path | None) -> list[_Candidate]:
    """By name, shape and text; all texts will do where a folder was named."""
    found = []
    for entry in StatisticsStore(folder).entries("second_moments"):
        wanted = [d_in for weight, d_in in weights.items() if same_weight(entry.origin.weight, weight)]
        places = [place for place, text in enumerate(texts) if text.same_reading(entry.origin.text)]
        if (places or folder) and any(_width(entry) == d_in for d_in in wanted):
            found.append(_Candidate(entry, places[0] if places else len(texts)))
    return found


def _width(entry: Entry) -> int:
    moments = read_header(entry.file).get("second_moment")
    return moments.shape[0] if moments else 0


def _of_model(candidates: Sequence[_Candidate], base: Path) -> list[_Candidate]:
    """Those made with exactly the weights in `base`."""
    tree, stored = skeleton(base), stored_tensors(base)
    name, layers = decoder_layers(tree)
    within = [each for each in candidates if each.entry.origin.layer < len(layers)]

    def read(weight: str, _: Tensor) -> Tensor:
        return stored[find_weight(weight, stored, str(base), "its statistics cannot be told from others")].read()

    below = digests_below(tree, name, max((each.entry.origin.layer for each in within), default=-1), read)
    return [each for each in within if each.entry.origin.model == below[each.entry.origin.layer]]


def _spectrum(entry: Entry) -> Spectrum:
    stored = {"second_moment": entry.verified()["second_moment"].read()}
    if not are_moments(stored):
        raise Damaged(f"{entry.file}: no second moments can be so")
    found = _largest(stored["second_moment"].double())
    others = len(found.vectors) - len(found.values)
    return Spectrum(found.values, found.vectors.float(), found.rest / others if others else 0.0)


def _largest(moments: Tensor) -> Leading:
    """The eigenpairs that rounding minds, at most."""
    found = leading(moments, 0.0, TEXT_DIRECTIONS)
    if found is None:
        values, vectors = torch.linalg.eigh(moments)
        values, first = values.clamp_min(0), max(0, len(values) - TEXT_DIRECTIONS)
        found = Leading(values[first:], vectors[:, first:], float(values[:first].sum()))
    return found
