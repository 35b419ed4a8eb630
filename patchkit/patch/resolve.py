"""From a patch to the state its next run starts from, and back; and a patch recomputed without some of its facts.

A patch is a sequence of solves, each a function of stored keys, stored residuals and the keys of earlier batches. To
take facts out, their columns are dropped and the solves are made again in order. A fact's value was optimized on top of
all earlier batches; when one of their facts goes, the value moves along with its start, so its residual stays the same.
At a later site, though, the residual was measured after the same batch's solves at earlier sites: what the removed
facts contributed there, at the keys of the others, is added back to it. The result is, to first order, the patch that
would have been made without those facts. No forward pass is needed as long as the statistics are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from patchkit import methods
from patchkit.editing.recipe import validate
from patchkit.editing.session import problem_at, solve_at
from patchkit.editing.state import BlockHistory, EditState, Neuron, SiteHistory, made_up_for, rewritten, storable
from patchkit.editing.values import ValueStates
from patchkit.errors import InputError
from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import Delta, PriorKeys
from patchkit.maths.updates import Chain, Update, delta_of, mapped, moved
from patchkit.methods import Beside
from patchkit.model.devices import exact, solve_device
from patchkit.model.weights import Site, read_weight
from patchkit.patch.history import SolveRecord, solve_records
from patchkit.patch.infos import update_infos
from patchkit.patch.manifest import BaseInfo, EditedFact, Manifest, Run
from patchkit.patch.patch import Patch, updates_digest
from patchkit.patch.superseded import Waiting, beside, state_of_waiting
from patchkit.patch.tensors import columns
from patchkit.patch.unfolded import norms_of

Sites = Mapping[str, Site]  # by on-disk name of the weight
# (a run's place in the history, a site) -> its covariance, None without one, and what else the method asks for
StatisticsOf = Callable[[int, Site], tuple[Covariance | None, Beside]]


def state_of(patch: Patch, sites: Sites) -> EditState:
    """The state that the patch's runs have left, in float64.

    Raises:
        InputError: the patch has no state, or that of another patch.
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
    state.neurons = _neurons(patch, sites)
    for name in sites:
        if not sites[name].solved or (name not in patch.updates and f"{name}.keys" not in patch.state):
            continue
        layer = sites[name].layer
        where = solve_device(sites[name].module)
        stored = (_stored_columns(patch, f"{name}.{kind}", layer) for kind in ("keys", "residuals"))
        keys, residuals = (exact(tensor, where) for tensor in stored)
        own = _gradient_columns(patch.manifest, layer)
        if sites[name].blocks > 1:
            chains = {
                site.expert: _wide(patch.updates.get(part, ()), where)
                for part, site in sites.items()
                if site.layer == layer and site.expert is not None
            }
            state.sites[layer] = BlockHistory(chains, sites[name].blocks, keys, residuals, own)
        else:
            chain = patch.updates.get(name, ())
            chain = _wide(chain[1:] if state.neurons_at(layer) else chain, where)
            state.sites[layer] = SiteHistory(chain, keys, residuals, own)
    if lost := [name for name in patch.manifest.base.stacks if name not in sites and f"{name}.keys" in patch.state]:
        raise InputError(
            f"{lost[0]}: the patch's state is of experts that the model keeps in other modules; continue and revert it "
            "with the code that it was made with"
        )
    state.values = [ValueStates(*(columns(patch.state, f"values.{kind}") for kind in ("targets", "start")))]
    if rows := {len(state.values[0].targets)} - {site.d_out for site in sites.values() if not site.opens}:
        raise InputError(f"state.safetensors: values of size {min(rows)}, the model has none such; get the patch again")
    state.subjects = {fact.subject for fact in facts}
    return state


def _wide(chain: Chain, where: torch.device) -> Chain:
    return tuple(mapped(moved(update, where), Tensor.double) for update in chain)


def _neurons(patch: Patch, sites: Sites) -> list[Neuron]:
    """The rewritten neurons of the patch, from their rows in its updates.

    Raises:
        InputError: updates that do not belong together.
    """
    found, rows, made_up = list[Neuron](), dict[int, dict[str, Delta]](), dict[int, Update]()
    for name, chain in patch.updates.items():
        site = sites[name]
        if not site.opens:
            made_up[site.layer] = chain[0]
        elif isinstance(chain[0], Delta):
            rows.setdefault(site.layer, {})[site.module_name] = chain[0]
    for layer, here in rows.items():
        others = made_up.get(layer)
        inner = others.right.shape[1] if isinstance(others, Delta) else 1
        each = {name: delta.left.shape[0] // inner for name, delta in here.items()}  # rows of one neuron in the weight
        if not isinstance(others, Delta) or any(here[name].rank != each[name] * others.rank for name in here):
            raise InputError("patch.safetensors: the rows of neurons do not belong together; get the patch again")
        listening = {name: storable(delta.right.unflatten(0, (-1, each[name]))) for name, delta in here.items()}
        name, first = next(iter(here.items()))
        for number, place in enumerate(first.left.argmax(0)[:: each[name]].tolist()):
            listens = {name: rows_of[number] for name, rows_of in listening.items()}
            lost, instead = storable(others.left[:, number]), storable(others.right[number])
            found.append(Neuron(layer, place, listens, lost, instead))
    return found


def _stored_columns(patch: Patch, name: str, layer: int) -> Tensor:
    wanted = sum(len(made.columns) for made in solve_records(patch.manifest, layer))
    tensor = columns(patch.state, name)
    if tensor.shape[1] != wanted:
        raise InputError(f"state.safetensors: {name} does not belong to the patch's manifest; get the patch again")
    return tensor


def _gradient_columns(manifest: Manifest, layer: int) -> list[int]:
    """The columns whose residuals are gradients."""
    made = (each for each in solve_records(manifest, layer) if _targets(manifest, each.run) == "gradients")
    return [column for each in made for column in each.columns]


def _targets(manifest: Manifest, run: int) -> str:
    return methods.get(manifest.history[run].method).targets


def without(
    patch: Patch, gone: Collection[str], sites: Sites, statistics_of: StatisticsOf, waiting: Sequence[Waiting] = ()
) -> Patch:
    """The patch without the facts in `gone`. Its history is as before: the caller adds the run that took them out.

    Args:
        gone: ids of facts in the patch.
        statistics_of: the statistics of a run, by its place in the history, at a site.
        waiting: superseded facts that the new patch keeps, to come back.

    Raises:
        InputError: the patch has no state, its weights were fine-tuned, or a solve is not finite.
    """
    return _changed(patch, gone, (), sites, statistics_of, waiting)


def with_again(
    patch: Patch, back: Sequence[Waiting], sites: Sites, statistics_of: StatisticsOf, waiting: Sequence[Waiting] = ()
) -> Patch:
    """The patch with the facts in `back`, as they were: what `without` did, undone up to float32's rounding.

    A fact comes back with its own residuals; those of the others lose again what `without` gave them in its stead.

    Raises:
        InputError: as `without`.
    """
    added = {each.fact.id for each in back}
    return _changed(beside(patch, back, sites), (), added, sites, statistics_of, waiting)


def _changed(
    patch: Patch,
    gone: Collection[str],
    added: Collection[str],
    sites: Sites,
    statistics_of: StatisticsOf,
    waiting: Sequence[Waiting],
) -> Patch:
    """The patch without the facts in `gone`, and with those in `added`, which its columns have and its updates do not
    (`beside`)."""
    manifest, changed = patch.manifest, {*gone, *added}
    _refuse_fitted(manifest, changed)
    state = state_of(patch, sites)
    stay = [i for i, fact in enumerate(manifest.facts) if fact.id not in gone]
    facts = tuple(manifest.facts[i] for i in stay)
    by_layer = {site.layer: site for site in sites.values() if site.solved}
    recompute = _Recompute(manifest, gone, added, by_layer, state, statistics_of)
    recompute.run()
    affected = _affected_layers(manifest, changed)
    # A superseded fact's neuron stays as it is, and says nothing until the fact is brought back.
    own = {(_layers(manifest, fact)[-1], fact.neuron) for fact in (*facts, *(each.fact for each in waiting))}
    state.neurons = [neuron for neuron in state.neurons if (neuron.layer, neuron.place) in own]
    state.sites = {layer: recompute.kept[layer] if layer in affected else old for layer, old in state.sites.items()}
    state.values = [states.of(stay) for states in state.values]
    return assemble(manifest.base, facts, manifest.history, sites, state, manifest.parents, waiting)


def _affected_layers(manifest: Manifest, gone: Collection[str]) -> set[int]:
    """Layers whose solves are different without the facts in `gone`: theirs, and those of every later fact that shares
    a layer with an affected one, since a value is spread over all of a fact's layers."""
    affected: set[int] = set()
    for fact in manifest.facts:  # in the order in which they were written
        layers = set(_layers(manifest, fact))
        if fact.id in gone or layers & affected:
            affected |= layers
    return affected


def _refuse_fitted(manifest: Manifest, gone: Collection[str]) -> None:
    """Raises InputError where a fact in `gone` shares a layer with a fine-tuning run, which has no solves to repeat."""
    affected = _affected_layers(manifest, gone)
    for fact in manifest.facts:
        run = manifest.history[fact.run]
        if _targets(manifest, fact.run) == "none" and affected.intersection(_layers(manifest, fact)):
            raise InputError(
                f"run {fact.run + 1} fine-tuned layer {run.layers[0]} ({run.method}), which cannot be done again "
                "without single facts; apply the facts that are to stay to the base anew"
            )


def _layers(manifest: Manifest, fact: EditedFact) -> Sequence[int]:
    return fact.layers or manifest.history[fact.run].layers


@dataclass(frozen=True)
class _LayerSolve:
    """A solve of the patch, at a layer, with the columns it had there: keys (d_in, n) and residual (d_out, n)."""

    record: SolveRecord
    layer: int
    keys: Tensor
    residual: Tensor

    @property
    def batch(self) -> tuple[int, int, int]:
        """What the solves of one sweep of a batch have in common."""
        return self.record.run, self.record.batch, self.record.sweep

    def of(self, facts: Sequence[int], residual: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of some of its columns, and their part of `residual` as float32 stores it."""
        return self.keys[:, list(facts)], storable(residual[:, list(facts)])


class _Recompute:
    """All of a patch's solves made once more, side by side: with the facts before a change, and with those after it.

    Attributes:
        every: by layer, the edit history before the change: without the facts in `added`.
        kept: by layer, the edit history after it: with those, and without the facts in `gone`.
    """

    def __init__(
        self,
        manifest: Manifest,
        gone: Collection[str],
        added: Collection[str],
        sites: Mapping[int, Site],
        state: EditState,
        statistics_of: StatisticsOf,
    ) -> None:
        self.manifest, self.gone, self.added = manifest, gone, added
        self.sites, self.statistics_of = sites, statistics_of
        self.every = {layer: SiteHistory.empty(sites[layer]) for layer in state.sites}
        self.kept = {layer: SiteHistory.empty(sites[layer]) for layer in state.sites}
        self.constants: dict[int, dict[Hashable, Any]] = {}
        solves = [
            _LayerSolve(record, layer, old.keys[:, columns], old.residuals[:, columns])
            for layer, old in state.sites.items()
            for record in solve_records(manifest, layer)
            for columns in [slice(record.columns.start, record.columns.stop)]
        ]
        self.solves = sorted(solves, key=lambda solve: (*solve.batch, solve.layer))

    def run(self) -> None:
        """Make the solves, in the order in which they were made."""
        prior = dict[int, tuple[PriorKeys, PriorKeys]]()
        lost = dict[int, Tensor]()
        for (_, _, sweep), group in groupby(self.solves, lambda solve: solve.batch):
            batch = list(group)
            for place, solve in enumerate(batch):
                if sweep == 0:
                    lost = {} if place == 0 else lost
                    prior[solve.layer] = self.every[solve.layer].prior, self.kept[solve.layer].prior
                share = self._missing(batch, lost, solve.keys.device) / (len(batch) - place)
                self._solve(solve, prior[solve.layer], share, lost)

    def _missing(self, batch: Sequence[_LayerSolve], lost: Mapping[int, Tensor], device: torch.device) -> Tensor:
        """What the facts of a batch lack, (d_out, n), because removed facts no longer contribute at their keys.

        `lost` is by layer what the batch's solves so far changed the weight (d_out, d_in) by with every fact, less what
        they change it by with those that stay.
        """
        missing = torch.zeros((), device=device)
        if _targets(self.manifest, batch[0].record.run) == "values":
            for solve in batch:
                if solve.layer in lost:
                    missing = missing + (lost[solve.layer] @ solve.keys).to(device)
        return missing

    def _solve(
        self, solve: _LayerSolve, prior: tuple[PriorKeys, PriorKeys], share: Tensor, lost: dict[int, Tensor]
    ) -> None:
        """Solve with the facts before the change and with those after it, whose residuals get `share` more unless they
        were added, each beside its own prior keys; note in `lost` what the weight loses."""
        layer, facts = solve.layer, solve.record.facts
        before = [i for i, fact in enumerate(facts) if fact not in self.added]
        after = [i for i, fact in enumerate(facts) if fact not in self.gone]
        if before:
            columns = solve.of(before, solve.residual)
            lost[layer] = lost.get(layer, 0) + self._add(solve, self.every[layer], prior[0], *columns)
        if after:
            residual = solve.residual + share
            new = [i for i in after if facts[i] in self.added]
            residual[:, new] = solve.residual[:, new]
            columns = solve.of(after, residual)
            lost[layer] = lost.get(layer, 0) - self._add(solve, self.kept[layer], prior[1], *columns)

    def _add(
        self, solve: _LayerSolve, history: SiteHistory, prior: PriorKeys, keys: Tensor, residual: Tensor
    ) -> Tensor:
        """Solve for these columns on top of `history`, and give the weight's change, (d_out, d_in)."""
        run, site = solve.record.run, self.sites[solve.layer]
        config = validate({"neurons": "off", **self.manifest.history[run].recipe}, "the patch's recipe")
        covariance, beside = self.statistics_of(run, site)
        own = config.neurons == "on"
        problem = problem_at(site, keys, residual, covariance, history, prior, beside, own_neurons=own)
        problem = problem.replace(constants=self.constants.setdefault(site.layer, {}))
        update = solve_at(methods.get(config.method), config.method_config(), site, problem)
        change = delta_of((update,), lambda: problem.weight).dense()
        history.add(update, keys, residual, _targets(self.manifest, run) == "gradients")
        return change


def assemble(
    base: BaseInfo,
    facts: tuple[EditedFact, ...],
    history: tuple[Run, ...],
    sites: Sites,
    state: EditState,
    parents: tuple[str, ...] = (),
    waiting: Sequence[Waiting] = (),
) -> Patch:
    """A patch of `facts` from the state that the runs have left; sites without an update are left out."""
    solved = {name: site.layer for name, site in sites.items() if site.layer in state.sites and site.solved}
    edited = {name: state.sites[layer] for name, layer in solved.items()}
    made = _chains(sites, state)
    chains = {name: tuple(mapped(u, Tensor.float) for u in made[name]) for name in sites}
    chains = {name: chain for name, chain in chains.items() if chain}
    updates = {name: tuple(moved(update, "cpu") for update in chain) for name, chain in chains.items()}
    tensors = dict(state_of_waiting(waiting))
    if facts:
        tensors["values.targets"] = torch.cat([v.targets.float().cpu() for v in state.values], 1).contiguous()
        tensors["values.start"] = torch.cat([v.start.float().cpu() for v in state.values], 1).contiguous()
    written = {sites[name].layer for name in updates}
    for name in [name for name in edited if sites[name].layer in written]:
        tensors[f"{name}.keys"] = edited[name].keys.float().cpu().contiguous()
        tensors[f"{name}.residuals"] = edited[name].residuals.float().cpu().contiguous()
    tensors |= norms_of(base, {name: sites[name] for name in updates})
    manifest = Manifest(
        base=base,
        facts=facts,
        updates=tuple(
            info for name, chain in chains.items() for info in update_infos(name, read_weight(sites[name]), chain)
        ),
        history=history,
        superseded=tuple(each.fact for each in waiting),
        parents=parents,
        digest=updates_digest(updates),
    )
    return Patch(manifest, updates, tensors)


def _chains(sites: Sites, state: EditState) -> dict[str, Chain]:
    """All updates of every weight; experts have theirs each, and none together."""
    by_expert = {layer: each.chains for layer, each in state.sites.items() if isinstance(each, BlockHistory)}
    return {
        name: _chain(site, state)
        if site.experts is None
        else by_expert.get(site.layer, {}).get(-1 if site.expert is None else site.expert, ())
        for name, site in sites.items()
    }


def _chain(site: Site, state: EditState) -> Chain:
    """All updates of a site's weight: of an opener the rows of neurons; of an output projection what is made up for
    those, then the edits."""
    neurons, where = state.neurons_at(site.layer), solve_device(site.module)
    if site.opens:
        return (moved(rewritten(neurons, site.module_name, site.d_out), where),) if neurons else ()
    edits = state.sites[site.layer].chain if site.layer in state.sites else ()
    made_up = (moved(made_up_for(neurons), where),) if neurons else ()
    return (*made_up, *(update for update in edits if update.rank))


def with_run(patch: Patch, run: Run, parent: str) -> Patch:
    """`patch` with one more entry in its history, made from the patch with digest `parent`."""
    added = {"history": (*patch.manifest.history, run), "parents": (parent,), "outcomes": {}}
    return replace(patch, manifest=patch.manifest.model_copy(update=added))
