"""`patchkit.apply` and `patchkit.revert`: a model, a tokenizer and facts in, a patch out; a patch less some facts."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from patchkit import methods
from patchkit.editing.editor import EditState, Plan, Progress, ValueCache, edit, frozen, plan
from patchkit.editing.gradients import text_gradients
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.errors import InputError
from patchkit.evaluate.metrics import Report, verify
from patchkit.facts.reader import Fact, parse_facts
from patchkit.facts.requests import build_request
from patchkit.maths.linalg import Covariance
from patchkit.methods import Method
from patchkit.model.arch import Site, inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import check_tokenizer, disk_name, model_name
from patchkit.patch.history import Incoming, choose_facts, sort_incoming
from patchkit.patch.manifest import BaseInfo, EditedFact, Run
from patchkit.patch.patch import Patch, weight_digest
from patchkit.patch.resolve import Sites, assemble, state_of, with_run, without
from patchkit.statistics.moments import Corpus, default_text, read_corpus, statistics, window_of

EVAL_TOKENS, EVAL_WINDOW = 4096, 512


def apply(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Iterable[Fact | Mapping[str, Any]],
    method: str | None = None,
    *,
    onto: Patch | None = None,
    recipe: str | None = None,
    set: Sequence[str] = (),
    text: str | Path | None = None,
    stats: str | Path | None = None,
    progress: Progress = lambda phase, done, total: None,
    values: ValueCache | None = None,
) -> Patch:
    """Compute the patch that makes `model` say every fact's target. The model is left bit for bit as it was.

    Args:
        model: a causal language model of transformers, on any device.
        tokenizer: its fast tokenizer.
        facts: `Fact`s, or mappings with at least prompt, subject and target_new; some methods need no subject.
        method: one of `patchkit methods`; alphaedit when neither method nor recipe says otherwise.
        onto: a patch to go on from, as if its facts and these had been batches of one run; also its recipe is gone on
            with, unless method or recipe say otherwise. A fact that is there already is skipped; one with the prompt
            of an earlier fact and another target supersedes it.
        recipe: a recipe file, or the name of one under recipes/<method>/.
        set: overrides in the form "key=value", such as "layers=4-8" or "value.steps=30".
        text: a UTF-8 text file for the statistics; without it a small English one that comes with patchkit.
        stats: folder for the statistics instead of the user's cache.
        progress: called with (phase, done, total).
        values: an empty dict to begin with, given to every call for the same model: values sought on the untouched
            model, of the first batch, are then shared between methods that ask for the same.

    Returns:
        A new patch with `onto`'s facts and history and this run, or `onto` itself if it has all the facts.

    Raises:
        InputError: a fact, the recipe, the text, the model or `onto` cannot be used; the message says which and why.
    """
    name = str(model.config._name_or_path)
    check_tokenizer(tokenizer, name)
    config = load_recipe(method, recipe, set, onto.manifest.history[-1].recipe if onto else None)
    known = parse_facts(
        facts,
        token_count=lambda target: count_tokens(tokenizer, target),
        needs_subject=methods.get(config.method).needs_subject,
    ).facts
    incoming = sort_incoming(known, onto.manifest.facts if onto else ())
    for fact in incoming.new:  # what cannot be tokenised should be known before minutes of statistics
        build_request(fact, tokenizer)
    with frozen(model):
        bench = _Bench(LayerRunner(inspect_model(model)), tokenizer, _texts(name, text), stats, progress)
        sites = onto.sites(bench.runner.arch) if onto else {}
        if onto and not incoming.new:
            return onto
        earlier = bench.less(onto, incoming.superseded, sites) if onto else None
        start = _start(earlier, sites, config) if earlier else None
        how = plan(bench.runner.arch, config)
        corpus = bench.corpus(bench.texts[0])
        covariances, gradients = bench.statistics(methods.get(config.method), how.sites, corpus)
        state = edit(bench.runner, tokenizer, incoming.new, config, covariances, progress, start, gradients, values)
    return _Made(bench.runner, incoming, config, how, corpus, state).patch(onto, earlier, sites)


def revert(
    model: PreTrainedModel,
    tokenizer: Any,
    patch: Patch,
    facts: Iterable[str],
    *,
    texts: Sequence[str | Path] = (),
    stats: str | Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Patch:
    """`patch` without some facts: its solves are made again without them, from the stored keys and residuals.

    The model serves to find the statistics that belong to it; it runs only if those have to be computed anew. A fact
    that a reverted one had superseded does not come back.

    Args:
        facts: ids of facts in the patch; `patchkit.patch.history.choose_facts` finds those of some runs.
        texts: the texts the statistics were made of, where that was not the default one.
        stats: folder for the statistics instead of the user's cache.

    Raises:
        InputError: an unknown id, another model, no state in the patch, or a text that is not there.
    """
    began, manifest = time.perf_counter(), patch.manifest
    gone = choose_facts(manifest, tuple(facts))
    with frozen(model):
        runner = LayerRunner(inspect_model(model))
        bench = _Bench(runner, tokenizer, _texts(str(model.config._name_or_path), *texts), stats, progress)
        less = bench.less(patch, gone, patch.sites(runner.arch))
    run = manifest.history[-1].model_copy(
        update={
            **_stamp(runner),
            "action": "revert",
            "facts": gone,
            "batches": (),
            "seconds": {"solve": round(time.perf_counter() - began, 3)},
            "metrics": None,
            "superseded": {},
            "skipped": (),
            "removed": tuple(fact for fact in manifest.facts if fact.id in gone),
        }
    )
    return with_run(less, run, manifest.digest)


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    patch: Patch,
    facts: Iterable[Fact | Mapping[str, Any]] | None = None,
    *,
    text: str | Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Report:
    """Measure `patch` on `model`, always against the untouched base: its own facts, or the given ones.

    Args:
        text: plain text for the perplexity; without it a small English one that comes with patchkit.

    Raises:
        InputError: the patch is for another model, or a fact cannot be used.
    """
    known = patch.manifest.facts if facts is None else parse_facts(facts).facts
    source = text or default_text(str(model.config._name_or_path), "eval")
    with frozen(model):
        return verify(
            LayerRunner(inspect_model(model)),
            tokenizer,
            known,
            lambda: patch.attached(model),
            read_corpus(source, tokenizer, EVAL_TOKENS, window_of(model, EVAL_WINDOW)),
            lambda done, total: progress("measuring", done, total),
        )


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of `text` alone, special ones not counted."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _texts(model_name: str, *given: str | Path | None) -> list[str | Path]:
    return [text for text in (*given, default_text(model_name)) if text]


@dataclass
class _Bench:
    """What applying and reverting work with: a model, its tokenizer, and where statistics come from."""

    runner: LayerRunner
    tokenizer: Any
    texts: Sequence[str | Path]
    stats: str | Path | None
    progress: Progress

    def corpus(self, text: str | Path) -> Corpus:
        """The text, tokenised."""
        model = self.runner.arch.model
        assert isinstance(model, PreTrainedModel)
        return read_corpus(text, self.tokenizer, window=window_of(model))

    def statistics(
        self, method: Method, sites: Sequence[Site], corpus: Corpus
    ) -> tuple[dict[int, Covariance], dict[int, Tensor]]:
        """Covariances and gradients of the text, by layer: those that `method` needs."""
        place, covariances, gradients = Path(self.stats) if self.stats else None, {}, {}
        if method.needs_statistics:
            covariances = statistics(self.runner, sites, corpus, place, lambda *at: self.progress("statistics", *at))
        if method.needs_gradients:
            found = text_gradients(self.runner, sites, corpus, place, lambda *at: self.progress("gradients", *at))
            gradients = {layer: each.left for layer, each in found.items()}
        return covariances, gradients

    def less(self, patch: Patch, gone: Collection[str], sites: Sites) -> Patch:
        """The patch without the facts in `gone`.

        Raises:
            InputError: the text that a run took its statistics from is not among the texts.
        """

        @cache  # finding statistics takes a digest of the weights below: once for all sites, and for runs alike
        def of_text(
            digest: str, window: int, method: str, layers: tuple[int, ...]
        ) -> tuple[dict[int, Covariance], dict[int, Tensor]] | None:
            origin = {"sha256": digest, "window": window}
            found = next((c for c in map(self.corpus, self.texts) if c.is_from(origin)), None)
            edited = [site for site in sites.values() if site.layer in layers]
            return None if found is None else self.statistics(methods.get(method), edited, found)

        def find(number: int, site: Site) -> tuple[Covariance | None, Tensor | None]:
            run = patch.manifest.history[number]
            method = methods.get(run.method)
            if not method.needs_statistics and not method.needs_gradients:
                return None, None
            found = of_text(run.text["sha256"], run.text.get("window", 0), run.method, run.layers)
            if found is None:
                read = f"sha256 {run.text['sha256'][:16]}..., in windows of {run.text.get('window', 256)} tokens"
                raise InputError(
                    f"run {number + 1} took its statistics from the text {run.text['source']} "
                    f"({read}), which is not here; give it with --text"
                )
            covariances, gradients = found
            return covariances.get(site.layer), gradients.get(site.layer)

        return without(patch, gone, sites, find) if gone else patch


def _start(earlier: Patch, sites: Sites, config: EditConfig) -> EditState:
    """The state to go on from. Contexts are the last run's, unless the recipe asks for other ones."""
    last = earlier.manifest.history[-1]
    alike = all(last.recipe.get(key) == getattr(config, key) for key in ("seed", "contexts", "context_length"))
    return state_of(earlier, sites).onward(last.contexts if alike else ())


@dataclass(frozen=True)
class _Made:
    """What a run had in hand when it ended, on its way into a patch."""

    runner: LayerRunner
    incoming: Incoming
    config: EditConfig
    plan: Plan
    corpus: Corpus
    state: EditState

    def patch(self, onto: Patch | None, earlier: Patch | None, sites: Sites) -> Patch:
        """The patch, `earlier` being `onto` without the superseded facts, and `sites` those of its base."""
        model = self.runner.arch.model
        assert isinstance(model, PreTrainedModel)
        named = {site.layer for site in sites.values()}
        new = {disk_name(model, site.weight_name): site for site in self.plan.sites if site.layer not in named}
        base = BaseInfo(
            name=model_name(model),
            commit=getattr(model.config, "_commit_hash", None),
            architecture=type(model).__name__,
            weights={},
        )
        base = onto.manifest.base if onto else base
        weights = base.weights | {name: weight_digest(site, name) for name, site in new.items()}
        facts = earlier.manifest.facts if earlier else ()
        history = onto.manifest.history if onto else ()
        return assemble(
            base.model_copy(update={"weights": weights}),
            (*facts, *self._edited(len(history), len(facts))),
            (*history, self._run(onto)),
            {**sites, **new},
            self.state,
            (onto.manifest.digest,) if onto else (),
        )

    def _edited(self, run: int, skip: int) -> Iterator[EditedFact]:
        batches = [i for i, size in enumerate(self.state.batches) for _ in range(size)]
        losses = torch.cat([v.loss.cpu() for v in self.state.values]).tolist()[skip:]
        steps = torch.cat([v.steps.cpu() for v in self.state.values]).tolist()[skip:]
        for place, layers, columns, batch, loss, count in zip(
            self.state.order, self.state.layers, self.state.columns, batches, losses, steps, strict=True
        ):
            own = () if layers == tuple(self.plan.layers) else layers
            yield EditedFact(
                **self.incoming.new[place].model_dump(),
                run=run,
                batch=batch,
                layers=own,
                columns=columns,
                target_loss=loss,
                steps=count,
            )

    def _run(self, onto: Patch | None) -> Run:
        superseded = self.incoming.superseded
        return Run(
            action="apply",
            method=self.config.method,
            paper=methods.get(self.config.method).paper,
            recipe=self.config.model_dump(),
            recipe_digest=self.config.digest(),
            facts=tuple(fact.id for fact in self.incoming.new),
            batches=tuple(self.state.batches),
            layers=tuple(self.plan.layers),
            value_at=self.plan.value_at,
            contexts=tuple(self.state.contexts),
            text=self.corpus.origin,
            seconds={phase: round(spent, 3) for phase, spent in self.state.seconds.items()},
            superseded=dict(superseded),
            skipped=self.incoming.skipped,
            removed=tuple(fact for fact in onto.manifest.facts if fact.id in superseded) if onto else (),
            **_stamp(self.runner),
        )


def _stamp(runner: LayerRunner) -> dict[str, Any]:
    """When and with what a run was made."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "patchkit": version("patchkit"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": str(runner.device),
            "dtype": str(next(runner.arch.model.parameters()).dtype).removeprefix("torch."),
        },
    }
