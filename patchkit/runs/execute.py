"""A prepared run executed: statistics, edits, and the patch with the run in its history; and facts taken out again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchkit import methods
from patchkit.editing.editor import edit, frozen
from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import Plan, ValueCache, plan
from patchkit.editing.state import BlockHistory, EditRun
from patchkit.errors import GateError
from patchkit.maths.covariance import Covariance, SideBySide
from patchkit.model.arch import Architecture
from patchkit.model.dequantized import unpacked_from
from patchkit.model.digests import weight_digest
from patchkit.model.expert_names import expert_sites
from patchkit.model.loading import model_name
from patchkit.model.openers import opening_sites
from patchkit.model.weights import Site, disk_name
from patchkit.patch.history import leave
from patchkit.patch.manifest import BaseInfo, EditedFact, Run
from patchkit.patch.patch import Patch
from patchkit.patch.resolve import Sites, assemble, state_of, with_run
from patchkit.patch.superseded import superseding, waiting_in, without_these
from patchkit.patch.together import rooms_beside
from patchkit.runs.advice import advice
from patchkit.runs.guard import Guard
from patchkit.runs.journals import journal_for
from patchkit.runs.key_check import KeyCheck
from patchkit.runs.prepare import Prepared
from patchkit.runs.settle import settle, with_network
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import PACKAGE_TEXT, Corpus
from patchkit.version import stamp
from patchkit.words import agreeing

SMALL_TEXT = "statistics: from the small English text that comes with patchkit; --text FILE with more text is better"


def run(
    prepared: Prepared,
    workspace: Workspace,
    say: Callable[[str], None] = lambda note: None,
    values: ValueCache | None = None,
    folder: Path | None = None,
    allow_close_keys: bool = False,
    guard: Guard | None = None,
    wrote: Callable[[EditRun], None] = lambda run: None,
) -> Patch:
    """Edit the new facts of `prepared`. The model is left bit for bit as it was.

    Args:
        say: told what the user should know, one sentence at a time.
        values: value targets found on the untouched model, to share between methods.
        folder: where the patch will be written. Batches and values that are finished are then kept until `forget` is
            called for it, and the same run goes on from them.
        allow_close_keys: write facts although their edits would show everywhere (`patchkit.editing.closeness`).
        guard: may end the run early, with the facts that were written before the model went wrong; it says why.
        wrote: told of the run after every batch, while the edits act on the model.

    Returns:
        A new patch with the earlier facts and history and this run, or `prepared.onto` itself if it has all the facts.

    Raises:
        InputError: the text, the model or the earlier patch cannot be used, the edit of a fact would show everywhere,
            or it is not finite.
        GateError: the guard ended the run before any fact was written that could be kept.
    """
    runner, config, onto = workspace.runner, prepared.config, prepared.onto
    method = methods.get(config.method)
    with frozen(workspace.model):
        sites = onto.sites(runner.arch) if onto else {}
        if onto and not prepared.incoming.new:
            return onto
        earlier = _without_superseded(workspace, prepared, sites)
        start = state_of(earlier, sites) if earlier else None
        config = settle(prepared, workspace, say)
        prepared = replace(prepared, config=config)
        how, corpus = plan(runner.arch, config), workspace.corpus(workspace.texts[0], config.uses_chat)
        for note in _about_text(workspace.texts[0], corpus, prepared):
            say(note)
        compared = _compared_at(runner.arch, config)
        looked_at = [*how.sites, *([] if compared in how.sites else [compared])]
        covariances, beside = workspace.statistics(method, looked_at, corpus, config.neurons == "on")
        config = with_network(config, beside)
        prepared = replace(prepared, config=config)
        for note in _about_experts(covariances):
            say(note)
        metric = covariances.get(compared.layer)
        if method.targets == "values" and metric is not None:  # without statistics there is no metric to compare in
            check = KeyCheck(workspace, config, compared, metric)
            check.run(prepared.incoming.new, earlier, start, say, allow_close_keys)
        if guard:
            guard.read_base()
        edited = edit(
            runner,
            workspace.tokenizer,
            prepared.incoming.new,
            config,
            covariances,
            workspace.progress,
            start,
            beside,
            values,
            _contexts(earlier, config) if earlier else (),
            journal_for(folder, prepared, workspace, corpus),
            rooms_beside(workspace.rooms(config, how.sites, covariances, corpus), prepared.beside),
            guard,
            wrote,
        )
    if guard and guard.reason:
        prepared, whole = _only_written(prepared, edited, guard), prepared
        if prepared.incoming.superseded != whole.incoming.superseded:  # an earlier fact stays whose successor is not
            return run(prepared, workspace, say, values, None, allow_close_keys)  # there: solve again beside it
    patch = _RunResult(workspace, prepared, how, corpus, edited).patch(earlier, sites)
    if method.spends_directions:
        say(_directions_left(patch))
    return patch


def _only_written(prepared: Prepared, edited: EditRun, guard: Guard) -> Prepared:
    """The run that the guard has ended, with the facts alone that it has written; GateError if there are none."""
    guard.tell(len(prepared.incoming.new), advice(prepared, guard))
    if not edited.facts:
        raise GateError(guard.message)
    written = {each.fact.id for each in edited.facts}
    new = tuple(fact for fact in prepared.incoming.new if fact.id in written)
    superseded = {old: by for old, by in prepared.incoming.superseded.items() if by in written}
    return replace(prepared, incoming=replace(prepared.incoming, new=new, superseded=superseded))


def _without_superseded(workspace: Workspace, prepared: Prepared, sites: Sites) -> Patch | None:
    """The patch that is continued, without the facts that new ones supersede, which it keeps to bring them back."""
    if prepared.onto is None:
        return None
    by = prepared.incoming.superseded
    waiting = [*waiting_in(prepared.onto, sites), *superseding(prepared.onto, sites, by)]
    return workspace.without(prepared.onto, by, sites, waiting)


def _compared_at(arch: Architecture, config: EditConfig) -> Site:
    """Where keys are compared: at the lowest layer of edits in ordinary keys, where the bounds were measured. A neuron
    of its own is higher up, where keys of all subjects are far from the template's, and fires at what is alike here."""
    return plan(arch, config.model_copy(update={"neurons": "off"})).sites[0]


def take_out(workspace: Workspace, patch: Patch, facts: Sequence[str]) -> Patch:
    """`patch` without the facts with these ids, and with a run of its own in the history that says so.

    Raises:
        InputError: an unknown id, another model, no state in the patch, or a text that is not there.
    """
    began, manifest = time.perf_counter(), patch.manifest
    leaving = leave(manifest, facts)
    gone = leaving.gone
    with frozen(workspace.model):
        sites = patch.sites(workspace.runner.arch)
        waiting = waiting_in(patch, sites)
        left = without_these(waiting, {*leaving.back, *leaving.dropped})
        less = workspace.without(patch, gone, sites, without_these(waiting, leaving.dropped))
        less = workspace.with_again(less, [waiting[place] for place in leaving.back], sites, left)
    record = manifest.history[-1].model_copy(
        update={
            **_stamp(workspace),
            "action": "revert",
            "facts": gone,
            "batches": (),
            "seconds": {"solve": round(time.perf_counter() - began, 3)},
            "metrics": None,
            "origin": None,
            "superseded": {},
            "skipped": (),
            "removed": tuple(fact for fact in manifest.facts if fact.id in gone),
            "restored": tuple(manifest.superseded[place].id for place in leaving.back),
        }
    )
    return with_run(less, record, manifest.digest)


def _about_text(text: Path, corpus: Corpus, prepared: Prepared) -> Iterator[str]:
    if text == PACKAGE_TEXT and methods.get(prepared.config.method).needs_statistics:
        yield SMALL_TEXT
    if prepared.onto:
        last = prepared.onto.manifest.history[-1].text
        if corpus.digest != last.sha256:
            yield f"statistics: from {text.name}, unlike those of the patch's last run ({last.source}): see --text"


def _about_experts(covariances: Mapping[int, Covariance]) -> Iterator[str]:
    """Which experts the text says too little of."""
    for layer, each in covariances.items():
        if isinstance(each, SideBySide) and each.few:
            yield (
                f"statistics: layer {layer}: {len(each.few)} of {len(each.matrix)} experts "
                f"{agreeing(len(each.few), 'get')} fewer tokens of the text than keys have entries, and "
                f"{agreeing(len(each.few), 'count')} in part as the layer's experts do in the mean; --text "
                "FILE with more text is better"
            )


def _directions_left(patch: Patch) -> str:
    fullest = min(patch.manifest.updates, key=lambda update: update.shape[0] - update.rank)
    left, whole = max(0, fullest.shape[0] - fullest.rank), fullest.shape[0]
    unused = f"{left} of {whole} output directions of {fullest.weight} {agreeing(left, 'are')} not used by any fact yet"
    return f"{unused}, one goes with each"


def _contexts(earlier: Patch, config: EditConfig) -> tuple[str, ...]:
    """The contexts to edit in: those of the last run, or none if the recipe asks for other ones."""
    last = earlier.manifest.history[-1]
    alike = all(
        last.recipe.get(key) == getattr(config, key) for key in ("seed", "prompts", "contexts", "context_length")
    )
    return last.contexts if alike else ()


@dataclass(frozen=True)
class _RunResult:
    """What a run has when it ends, from which its patch is made."""

    workspace: Workspace
    prepared: Prepared
    plan: Plan
    corpus: Corpus
    edited: EditRun

    def patch(self, earlier: Patch | None, sites: Sites) -> Patch:
        """The patch, `earlier` being the one continued without the superseded facts, and `sites` those of its base."""
        model, onto = self.workspace.model, self.prepared.onto
        named, arch = {site.weight_name for site in sites.values()}, self.workspace.runner.arch
        edited = [*self.plan.sites]
        for layer in sorted({neuron.layer for neuron in self.edited.state.neurons}):
            edited += opening_sites(arch, arch.sites[layer])
        new = {disk_name(model, site.weight_name): site for site in edited if site.experts is None}
        for site in edited:
            new |= self._of_experts(site)
        new = {name: site for name, site in new.items() if site.weight_name not in named}
        base = BaseInfo(
            name=model_name(model),
            commit=getattr(model.config, "_commit_hash", None),
            architecture=type(model).__name__,
            weights={},
            quantized=unpacked_from(model),
        )
        base = onto.manifest.base if onto else base
        weights = base.weights | {name: weight_digest(site, name) for name, site in new.items() if site.blocks == 1}
        stacks = base.stacks | {name: site.blocks for name, site in new.items() if site.blocks > 1}
        facts = earlier.manifest.facts if earlier else ()
        history = onto.manifest.history if onto else ()
        return assemble(
            base.model_copy(update={"weights": weights, "stacks": stacks}),
            (*facts, *self._facts(len(history))),
            (*history, self._record()),
            {**sites, **new},
            self.edited.state,
            (onto.manifest.digest,) if onto else (),
            waiting_in(earlier, sites) if earlier else (),
        )

    def _of_experts(self, site: Site) -> dict[str, Site]:
        """A site of experts, and those of them that were changed, by name; nothing for other sites."""
        history = self.edited.state.sites.get(site.layer)
        if not isinstance(history, BlockHistory):
            return {}
        parts = expert_sites(self.workspace.model, site)
        return {site.weight_name: site} | {parts[block].weight_name: parts[block] for block in history.chains}

    def _facts(self, run: int) -> Iterator[EditedFact]:
        """The facts of this run, which is number `run` in the history."""
        for written in self.edited.facts:
            yield EditedFact(
                **written.fact.model_dump(),
                run=run,
                batch=written.batch,
                layers=() if written.layers == tuple(self.plan.layers) else written.layers,
                columns=written.columns,
                target_loss=written.loss,
                steps=written.steps,
                neuron=written.neuron,
            )

    def _record(self) -> Run:
        """The run as an entry of the history."""
        config, incoming, onto = self.prepared.config, self.prepared.incoming, self.prepared.onto
        return Run(
            action="apply",
            method=config.method,
            paper=methods.get(config.method).paper,
            recipe=config.model_dump(),
            recipe_digest=config.digest(),
            facts=tuple(fact.id for fact in incoming.new),
            batches=tuple(self.edited.batches),
            layers=tuple(self.plan.layers),
            value_at=self.plan.value_at,
            contexts=tuple(self.edited.contexts),
            text=self.corpus.record,
            seconds={phase: round(spent, 3) for phase, spent in self.edited.seconds.items()},
            superseded=dict(incoming.superseded),
            skipped=tuple(incoming.skipped.values()),
            removed=tuple(fact for fact in onto.manifest.facts if fact.id in incoming.superseded) if onto else (),
            **_stamp(self.workspace),
        )


def _stamp(workspace: Workspace) -> dict[str, Any]:
    """When and with what a run was made."""
    dtype = str(next(workspace.model.parameters()).dtype).removeprefix("torch.")
    return stamp(device=str(workspace.runner.device), dtype=dtype)
