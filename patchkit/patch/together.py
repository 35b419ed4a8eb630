"""Whether patches that were made apart can act together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

from patchkit.editing.room import Room
from patchkit.errors import InputError
from patchkit.patch.manifest import EditedFact, Manifest
from patchkit.patch.patch import Patch


def refuse_shared_neurons(manifests: Mapping[str, Manifest]) -> None:
    """Refuse patches, by what they are called, two of which have rewritten the same neuron: each takes the ones that
    matter least to the base, so that patches made apart mostly do. What acts then is the sum of both, which fires at
    neither subject.

    Raises:
        InputError: there are two such patches.
    """
    own = {name: _rewritten(manifest) for name, manifest in manifests.items()}
    for (one, mine), (other, its) in combinations(own.items(), 2):
        for (layer, neuron), fact in mine.items():
            if (layer, neuron) in its:
                told = f"{one} for {fact.in_short}, {other} for {its[layer, neuron].in_short}"
                raise InputError(
                    f"patches {one} and {other} cannot act together: both have rewritten neuron {neuron} of layer "
                    f"{layer} ({told}); make one of them anew with --beside the other, or add "
                    "its facts to the other (--onto)"
                )


def rooms_beside(rooms: Mapping[int, Room], patches: Iterable[Patch]) -> dict[int, Room]:
    """By layer, the neurons that may be rewritten, less those that these patches have."""
    taken = {place for patch in patches for place in _rewritten(patch.manifest)}
    return {layer: room.less({number for at, number in taken if at == layer}) for layer, room in rooms.items()}


def _rewritten(manifest: Manifest) -> dict[tuple[int, int], EditedFact]:
    """The facts whose subjects have a neuron of their own, by its layer and number. Those of superseded facts are
    rewritten still."""
    return {
        ((fact.layers or manifest.history[fact.run].layers)[-1], fact.neuron): fact
        for fact in (*manifest.superseded, *manifest.facts)
        if fact.neuron is not None
    }
