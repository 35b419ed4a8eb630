"""From a patch back to what its next run starts from, and to a patch again; its solves made once more without some
facts.

A delta is a sequence of solves, each a function of stored keys, stored residuals and the keys of earlier batches. To
take facts out, their columns are dropped everywhere and the solves of the sites they touch made again in order. The
residuals that other facts were left with had been measured with the dropped ones present, so what comes out is, to
first order, what a patch made without them would hold. No forward pass is needed as long as the statistics are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from patchkit.arch import Site
from patchkit.editor import EditState, solve
from patchkit.errors import InputError
from patchkit.history import solves
from patchkit.linalg import Covariance, Delta
from patchkit.manifest import BaseInfo, EditedFact, Manifest, Run, UpdateInfo
from patchkit.patch import Patch, updates_digest
from patchkit.recipe import validate
from patchkit.values import Values

Sites = Mapping[str, Site]  # by on-disk name of the weight
CovarianceOf = Callable[[int, Site], Covariance | None]


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
    for name, delta in patch.updates.items():
        layer = sites[name].layer
        keys, residuals = (_column_tensor(patch, f"{name}.{kind}", layer) for kind in ("keys", "residuals"))
        state.deltas[layer], state.keys[layer], state.residuals[layer] = delta.to(torch.float64), keys, residuals
    loss = torch.tensor([fact.target_loss for fact in facts])
    steps = torch.tensor([fact.steps for fact in facts])
    targets, start = patch.state["values.targets"], patch.state["values.start"]
    state.values = [Values(targets, start, loss, steps)]
    return state


def _column_tensor(patch: Patch, name: str, layer: int) -> Tensor:
    wanted = sum(len(made.columns) for made in solves(patch.manifest, layer))
    tensor = patch.state.get(name)
    if tensor is None or tensor.shape[1] != wanted:
        raise InputError(f"state.safetensors: {name} does not belong to the patch's manifest; get the patch again")
    return tensor.double()


def without(patch: Patch, gone: Collection[str], sites: Sites, covariance_of: CovarianceOf) -> Patch:
    """The patch with the facts in `gone` taken out; its history is left for the caller to add to.

    Args:
        gone: ids of facts in the patch.
        covariance_of: the statistics of a run, by its place in the history, at a site.

    Raises:
        InputError: the patch has no state, or a solve is not finite.
    """
    state, manifest = state_of(patch, sites), patch.manifest
    stay = [i for i, fact in enumerate(manifest.facts) if fact.id not in gone]
    facts = tuple(manifest.facts[i] for i in stay)
    for site in sites.values():
        made = [pair for each in solves(manifest, site.layer) for pair in zip(each.columns, each.facts, strict=True)]
        kept = [column for column, fact in made if fact not in gone]
        if len(kept) < len(made):
            state.keys[site.layer] = state.keys[site.layer][:, kept]  # (d_in, kept)
            state.residuals[site.layer] = state.residuals[site.layer][:, kept]  # (d_out, kept)
            left = manifest.model_copy(update={"facts": facts})
            state.deltas[site.layer] = _solved_again(left, site, state, covariance_of)
    state.values = [Values(v.targets[:, stay], v.start[:, stay], v.loss[stay], v.steps[stay]) for v in state.values]
    return assemble(manifest.base, facts, manifest.history, sites, state, manifest.parents)


def _solved_again(manifest: Manifest, site: Site, state: EditState, covariance_of: CovarianceOf) -> Delta:
    keys, residuals = state.keys[site.layer], state.residuals[site.layer]
    deltas = [Delta(residuals[:, :0], keys[:, :0].T)]
    for made in solves(manifest, site.layer):
        config = validate(manifest.history[made.run].recipe, "the patch's recipe")
        columns, prior = slice(made.columns.start, made.columns.stop), keys[:, : made.batch_start]
        covariance = covariance_of(made.run, site)
        deltas.append(solve(config, site, keys[:, columns], residuals[:, columns], prior, covariance))
    return Delta.stack(deltas)


def assemble(
    base: BaseInfo,
    facts: tuple[EditedFact, ...],
    history: tuple[Run, ...],
    sites: Sites,
    state: EditState,
    parents: tuple[str, ...] = (),
) -> Patch:
    """A patch of `facts` from what the runs left behind; sites without an update are left out."""
    deltas = {name: state.deltas.get(site.layer) for name, site in sites.items()}
    updates = {name: delta.to(torch.float32) for name, delta in deltas.items() if delta is not None and delta.rank}
    tensors = {}
    if facts:
        tensors["values.targets"] = torch.cat([v.targets.float().cpu() for v in state.values], 1).contiguous()
        tensors["values.start"] = torch.cat([v.start.float().cpu() for v in state.values], 1).contiguous()
    for name in updates:
        tensors[f"{name}.keys"] = state.keys[sites[name].layer].float().contiguous()
        tensors[f"{name}.residuals"] = state.residuals[sites[name].layer].float().contiguous()
    manifest = Manifest(
        base=base,
        facts=facts,
        updates=tuple(_update_info(name, sites[name], delta) for name, delta in updates.items()),
        history=history,
        parents=parents,
        digest=updates_digest(updates),
    )
    return Patch(manifest, updates, tensors)


def _update_info(name: str, site: Site, delta: Delta) -> UpdateInfo:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return UpdateInfo(
        weight=name,
        rank=delta.rank,
        shape=(delta.left.shape[0], delta.right.shape[1]),
        norm=delta.norm(),
        weight_norm=float(weight.detach().float().norm()),
    )


def with_run(patch: Patch, run: Run, parent: str) -> Patch:
    """`patch` with one more entry in its history, made from the patch with digest `parent`."""
    added = {"history": (*patch.manifest.history, run), "parents": (parent,)}
    return replace(patch, manifest=patch.manifest.model_copy(update=added))
