"""From a patch back to what its next run starts from, and to a patch again; its solves made once more without some
facts.

A patch is a sequence of solves, each a function of stored keys, stored residuals and the keys of earlier batches. To
take facts out, their columns are dropped and the solves made again in order. A fact's value was sought on top of what
earlier batches had done, and moves with it when one of those facts goes, so what it lacks stays the same. What it
lacked at a later site had been measured after its own batch's solves at earlier ones, though: what the facts that go
contributed there at the others' keys is put back. So what comes out is, to first order, what a patch made without them
would hold. No forward pass is needed as long as the statistics are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchkit import methods
from patchkit.editing.recipe import validate
from patchkit.editing.session import problem_at, solve_at
from patchkit.editing.state import EditState, SiteHistory, storable
from patchkit.editing.values import ValueStates
from patchkit.errors import InputError
from patchkit.maths.linalg import Covariance, PriorKeys
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Chain, Update, delta_of, kind_of, mapped, tensors_of
from patchkit.model.weights import Site, read_weight
from patchkit.patch.history import SolveRecord, solve_records
from patchkit.patch.manifest import BaseInfo, EditedFact, Manifest, Run, UpdateInfo
from patchkit.patch.patch import Patch, updates_digest

Sites = Mapping[str, Site]  # by on-disk name of the weight
# a run, by its place in the history, and a site -> the covariance and the gradient of plain text, where it needs them
StatisticsOf = Callable[[int, Site], tuple[Covariance | None, Tensor | None]]


def state_of(patch: Patch, sites: Sites) -> EditState:
    """What the patch's runs left behind, by layer, in float64.

    Raises:
        InputError: the patch has no state, or one that is not its own.
    """
    facts = patch.manifest.facts
    if not facts:
        return EditState()
    if not patch.state:
        raise InputError(
            "the patch has no state.safetensors, from which it is continued and reverted; get that file too, "
            "or apply all its facts anew"
        )
    state = EditState()
    for name, chain in patch.updates.items():
        layer = sites[name].layer
        keys, residuals = (_column_tensor(patch, f"{name}.{kind}", layer) for kind in ("keys", "residuals"))
        chain = tuple(mapped(update, Tensor.double) for update in chain)
        state.sites[layer] = SiteHistory(chain, keys, residuals, _gradient_columns(patch.manifest, layer))
    state.values = [ValueStates(patch.state["values.targets"], patch.state["values.start"])]
    state.subjects = {fact.subject for fact in facts}
    return state


def _column_tensor(patch: Patch, name: str, layer: int) -> Tensor:
    wanted = sum(len(made.columns) for made in solve_records(patch.manifest, layer))
    tensor = patch.state.get(name)
    if tensor is None or tensor.shape[1] != wanted:
        raise InputError(f"state.safetensors: {name} does not belong to the patch's manifest; get the patch again")
    return tensor.double()


def _gradient_columns(manifest: Manifest, layer: int) -> list[int]:
    """The columns whose residuals are gradients."""
    made = (each for each in solve_records(manifest, layer) if _targets(manifest, each.run) == "gradients")
    return [column for each in made for column in each.columns]


def _targets(manifest: Manifest, run: int) -> str:
    return methods.get(manifest.history[run].method).targets


def without(patch: Patch, gone: Collection[str], sites: Sites, statistics_of: StatisticsOf) -> Patch:
    """The patch with the facts in `gone` taken out; its history is left for the caller to add to.

    Args:
        gone: ids of facts in the patch.
        statistics_of: the statistics of a run, by its place in the history, at a site.

    Raises:
        InputError: the patch has no state, its weights were fine-tuned, or a solve is not finite.
    """
    _refuse_fitted(patch.manifest, gone)
    state, manifest = state_of(patch, sites), patch.manifest
    stay = [i for i, fact in enumerate(manifest.facts) if fact.id not in gone]
    facts = tuple(manifest.facts[i] for i in stay)
    again = _Recompute(manifest, gone, {site.layer: site for site in sites.values()}, state, statistics_of)
    again.run()
    changed = _reached(manifest, gone)
    state.sites = {layer: again.made[layer] if layer in changed else solved for layer, solved in state.sites.items()}
    state.values = [states.of(stay) for states in state.values]
    return assemble(manifest.base, facts, manifest.history, sites, state, manifest.parents)


def _reached(manifest: Manifest, gone: Collection[str]) -> set[int]:
    """Layers at which something is solved differently without the facts in `gone`: theirs, and those of every later
    fact that shares a layer with those before, since a value is spread over all of a fact's layers."""
    reached: set[int] = set()
    for fact in manifest.facts:  # in the order in which they were written
        layers = set(_layers(manifest, fact))
        if fact.id in gone or layers & reached:
            reached |= layers
    return reached


def _refuse_fitted(manifest: Manifest, gone: Collection[str]) -> None:
    """Raises InputError where a fact in `gone` shares a layer with a run that has no solves to make again."""
    reached = _reached(manifest, gone)
    for fact in manifest.facts:
        run = manifest.history[fact.run]
        if _targets(manifest, fact.run) == "none" and reached.intersection(_layers(manifest, fact)):
            raise InputError(
                f"run {fact.run + 1} fine-tuned layer {run.layers[0]} ({run.method}), which cannot be done again "
                "without single facts; apply the facts that are to stay to the base anew"
            )


def _layers(manifest: Manifest, fact: EditedFact) -> Sequence[int]:
    return fact.layers or manifest.history[fact.run].layers


class _Recompute:
    """All of a patch's solves made once more, side by side with every fact and without those that go."""

    def __init__(
        self,
        manifest: Manifest,
        gone: Collection[str],
        sites: Mapping[int, Site],
        state: EditState,
        statistics_of: StatisticsOf,
    ) -> None:
        self.manifest, self.gone, self.sites, self.statistics_of = manifest, gone, sites, statistics_of
        self.old = state.sites
        self.made = {layer: SiteHistory.empty(sites[layer]) for layer in state.sites}
        # What the batch's solves changed each weight (d_out, d_in) by with every fact, less what they do without.
        self.lost = dict[int, Tensor]()

    def run(self) -> None:
        """Make them, in the order in which they were made."""
        everything = [(made, layer) for layer in self.old for made in solve_records(self.manifest, layer)]
        everything.sort(key=lambda pair: (pair[0].run, pair[0].batch, pair[0].sweep, pair[1]))
        batches: dict[tuple[int, int, int], list[tuple[SolveRecord, int]]] = {}
        for made, layer in everything:
            batches.setdefault((made.run, made.batch, made.sweep), []).append((made, layer))
        with_all = {layer: SiteHistory.empty(self.sites[layer]) for layer in self.old}
        prior = dict[int, tuple[PriorKeys, PriorKeys]]()
        for batch in batches.values():
            for place, (made, layer) in enumerate(batch):
                if made.sweep == 0:
                    self.lost = {} if place == 0 else self.lost
                    prior[layer] = with_all[layer].prior, self.made[layer].prior
                before, now = prior[layer]
                share = self._put_back(batch) / (len(batch) - place)
                residual = self.old[layer].residuals[:, made.columns.start : made.columns.stop]
                kept = [i for i, fact in enumerate(made.facts) if fact not in self.gone]
                self._solve(made, layer, with_all[layer], before, residual, range(len(made.facts)), 1)
                self._solve(made, layer, self.made[layer], now, residual + share, kept, -1)

    def _put_back(self, batch: Sequence[tuple[SolveRecord, int]]) -> Tensor:
        """What the facts of a batch lack, (d_out, n), because facts that go no longer contribute at their keys."""
        missing = torch.zeros(())
        if _targets(self.manifest, batch[0][0].run) == "values":
            for made, layer in batch:
                if layer in self.lost:
                    missing = (
                        missing + self.lost[layer] @ self.old[layer].keys[:, made.columns.start : made.columns.stop]
                    )
        return missing

    def _solve(
        self,
        made: SolveRecord,
        layer: int,
        solved: SiteHistory,
        prior: PriorKeys,
        residual: Tensor,
        facts: Sequence[int],
        sign: int,
    ) -> None:
        """SolveRecord for some of the facts of `made` on top of `solved`, and count what that changes the weight by."""
        if not facts:
            return
        config = validate(self.manifest.history[made.run].recipe, "the patch's recipe")
        keys = self.old[layer].keys[:, made.columns.start : made.columns.stop][:, list(facts)]
        residual, (covariance, gradient) = (
            storable(residual[:, list(facts)]),
            self.statistics_of(made.run, self.sites[layer]),
        )
        problem = problem_at(self.sites[layer], keys, residual, covariance, solved, prior, gradient)
        update = solve_at(methods.get(config.method), config.method_config(), self.sites[layer], problem)
        self.lost[layer] = self.lost.get(layer, 0) + sign * delta_of((update,), lambda: problem.weight).dense()
        solved.add(update, keys, residual, _targets(self.manifest, made.run) == "gradients")


def assemble(
    base: BaseInfo,
    facts: tuple[EditedFact, ...],
    history: tuple[Run, ...],
    sites: Sites,
    state: EditState,
    parents: tuple[str, ...] = (),
) -> Patch:
    """A patch of `facts` from what the runs left behind; sites without an update are left out."""
    solved = {name: state.sites[site.layer] for name, site in sites.items() if site.layer in state.sites}
    chains = {name: tuple(mapped(u, Tensor.float) for u in each.chain if u.rank) for name, each in solved.items()}
    updates = {name: chain for name, chain in chains.items() if chain}
    tensors = {}
    if facts:
        tensors["values.targets"] = torch.cat([v.targets.float().cpu() for v in state.values], 1).contiguous()
        tensors["values.start"] = torch.cat([v.start.float().cpu() for v in state.values], 1).contiguous()
    for name in updates:
        tensors[f"{name}.keys"] = solved[name].keys.float().contiguous()
        tensors[f"{name}.residuals"] = solved[name].residuals.float().contiguous()
    manifest = Manifest(
        base=base,
        facts=facts,
        updates=tuple(info for name, chain in updates.items() for info in _infos(name, sites[name], chain)),
        history=history,
        parents=parents,
        digest=updates_digest(updates),
    )
    return Patch(manifest, updates, tensors)


def _infos(name: str, site: Site, chain: Chain) -> Iterator[UpdateInfo]:
    """What the manifest says of each update; its norm is that of the change with it and all before it."""
    weight = read_weight(site)  # (d_out, d_in)
    weight_norm = float(weight.float().norm())
    for place, update in enumerate(chain):
        made = delta_of(chain[: place + 1], lambda: weight.float().cpu())
        norm = made.norm()
        yield UpdateInfo(
            weight=name,
            place=place,
            kind=kind_of(update),
            side=update.side if isinstance(update, Rotation) else None,
            angles=_angles(update),
            rank=update.rank,
            shape=(weight.shape[0], weight.shape[1]),
            numbers=sum(tensor.numel() for tensor in tensors_of(update).values() if tensor.is_floating_point()),
            norm=norm,
            weight_norm=weight_norm,
        )


def _angles(update: Update) -> tuple[float, float, float] | None:
    if not isinstance(update, Rotation) or not update.rank:
        return None
    spectrum = update.spectrum()
    return float(spectrum[0]), float(spectrum.median()), float(spectrum[-1])


def with_run(patch: Patch, run: Run, parent: str) -> Patch:
    """`patch` with one more entry in its history, made from the patch with digest `parent`."""
    added = {"history": (*patch.manifest.history, run), "parents": (parent,), "outcomes": {}}
    return replace(patch, manifest=patch.manifest.model_copy(update=added))
