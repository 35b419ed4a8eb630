"""Superseded facts, whose columns stay in the state: reverting the fact in their place brings them back.

state.safetensors holds <weight>.superseded.keys and <weight>.superseded.residuals, the columns of each such fact in
each solve, fact by fact in the order of `Manifest.superseded`, and values.superseded.targets and .start, one for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchkit.editing.values import ValueStates
from patchkit.model.weights import Site
from patchkit.patch.history import solve_records
from patchkit.patch.manifest import EditedFact, Manifest, SupersededFact
from patchkit.patch.patch import Patch
from patchkit.patch.tensors import columns as stored

Columns = tuple[Tensor, Tensor]  # keys (d_in, n) and residuals (d_out, n)


@dataclass(frozen=True)
class Waiting:
    """A superseded fact with its columns by weight, and its value's target and start, (d, 1) each."""

    fact: SupersededFact
    columns: Mapping[str, Columns]
    values: ValueStates


def waiting_in(patch: Patch, sites: Mapping[str, Site]) -> list[Waiting]:
    """The superseded facts that the patch's state has.

    Raises:
        InputError: it is the state of another patch.
    """
    found, taken = list[Waiting](), dict[str, int]()
    for place, fact in enumerate(patch.manifest.superseded):
        columns = dict[str, Columns]()
        for name, site in _outputs(sites):
            if count := columns_at(patch.manifest, fact, site.layer):
                first = taken.get(name, 0)
                keys, residuals = (stored(patch.state, f"{name}.superseded.{kind}") for kind in ("keys", "residuals"))
                columns[name] = keys[:, first : first + count], residuals[:, first : first + count]
                taken[name] = first + count
        targets, start = (stored(patch.state, f"values.superseded.{kind}")[:, [place]] for kind in ("targets", "start"))
        found.append(Waiting(fact, columns, ValueStates(targets, start)))
    return found


def _outputs(sites: Mapping[str, Site]) -> Iterator[tuple[str, Site]]:
    """The output projections, which alone have columns."""
    return ((name, site) for name, site in sites.items() if site.solved)


def columns_at(manifest: Manifest, fact: EditedFact, layer: int) -> int:
    """How many columns a fact has at a layer."""
    run = manifest.history[fact.run]
    return fact.columns * int(run.recipe.get("sweeps", 1)) if layer in (fact.layers or run.layers) else 0


def superseding(patch: Patch, sites: Mapping[str, Site], by: Mapping[str, str]) -> list[Waiting]:
    """Facts of the patch as they are in its state, `by` naming for each the fact that takes its place."""
    manifest, found = patch.manifest, list[Waiting]()
    for place, fact in enumerate(manifest.facts):
        if fact.id in by:
            columns = {
                name: tuple(stored(patch.state, f"{name}.{kind}")[:, at] for kind in ("keys", "residuals"))
                for name, site in _outputs(sites)
                if (at := _places(manifest, site.layer).get(fact.id))
            }
            values = ValueStates(*(stored(patch.state, f"values.{kind}")[:, [place]] for kind in ("targets", "start")))
            noted = SupersededFact(**dict(fact), by=by[fact.id])
            found.append(Waiting(noted, columns, values))  # type: ignore[arg-type]
    return found


def _places(manifest: Manifest, layer: int) -> dict[str, list[int]]:
    """The columns of every fact at a layer, in the order of the solves."""
    found: dict[str, list[int]] = {}
    for made in solve_records(manifest, layer):
        for fact, column in zip(made.facts, made.columns, strict=True):
            found.setdefault(fact, []).append(column)
    return found


def state_of_waiting(waiting: Sequence[Waiting]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `waiting_in` reads, by name."""
    for name in sorted({name for each in waiting for name in each.columns}):
        for place, kind in enumerate(("keys", "residuals")):
            parts = [each.columns[name][place] for each in waiting if name in each.columns]
            yield f"{name}.superseded.{kind}", torch.cat(parts, 1).float().cpu().contiguous()
    for kind in ("targets", "start") if waiting else ():
        parts = [getattr(each.values, kind) for each in waiting]
        yield f"values.superseded.{kind}", torch.cat(parts, 1).float().cpu().contiguous()


def beside(patch: Patch, back: Sequence[Waiting], sites: Mapping[str, Site]) -> Patch:
    """The patch with the columns of `back` at the places that they had, and updates as they were: those of a patch
    whose solves leave these facts out."""
    manifest, waiting = patch.manifest, {each.fact.id: each for each in back}
    again = [EditedFact(**{key: value for key, value in each.fact if key != "by"}) for each in back]
    written = {fact.id: place for place, fact in enumerate((*manifest.facts, *again))}
    order = {run: {name: place for place, name in enumerate(made.facts)} for run, made in enumerate(manifest.history)}
    facts = tuple(
        sorted((*manifest.facts, *again), key=lambda fact: (fact.run, fact.batch, order[fact.run].get(fact.id, 0)))
    )
    joined = manifest.model_copy(update={"facts": facts})
    state = dict(patch.state)
    for kind in ("targets", "start"):
        parts = [*([state[f"values.{kind}"]] if manifest.facts else []), *(getattr(e.values, kind) for e in back)]
        state[f"values.{kind}"] = torch.cat(parts, 1)[:, [written[fact.id] for fact in facts]]
    for name, site in _outputs(sites):
        old = _places(manifest, site.layer)
        for place, kind in enumerate(("keys", "residuals")):
            own = {fact: list(columns) for fact, columns in old.items()}
            more = {name_: iter(each.columns[name][place].T) for name_, each in waiting.items() if name in each.columns}
            made = [
                next(more[fact]) if fact in more else state[f"{name}.{kind}"][:, own[fact].pop(0)]
                for record in solve_records(joined, site.layer)
                for fact in record.facts
            ]
            if made:
                state[f"{name}.{kind}"] = torch.stack(made, 1)
    return replace(patch, manifest=joined, state=state)


def without_these(waiting: Sequence[Waiting], places: Collection[int]) -> list[Waiting]:
    """All but those at these places."""
    return [each for place, each in enumerate(waiting) if place not in places]
