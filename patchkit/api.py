"""`patchkit.apply`: a model, a tokenizer and facts in, a patch out."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from patchkit import methods
from patchkit.arch import inspect_model
from patchkit.editor import EditState, Plan, Progress, edit, frozen, plan
from patchkit.facts import Fact, parse_facts
from patchkit.forward import LayerRunner
from patchkit.linalg import Delta
from patchkit.manifest import BaseInfo, EditedFact, Manifest, Run, UpdateInfo
from patchkit.models import check_tokenizer, disk_name, model_name
from patchkit.patch import Patch, updates_digest, weight_digest
from patchkit.recipe import EditConfig, load_recipe
from patchkit.requests import build_request
from patchkit.stats import Corpus, default_text, read_corpus, statistics, window_of
from patchkit.verify import Report, verify

EVAL_TOKENS, EVAL_WINDOW = 8192, 512


def apply(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Iterable[Fact | Mapping[str, Any]],
    method: str | None = None,
    *,
    recipe: str | None = None,
    set: Sequence[str] = (),
    text: str | Path | None = None,
    stats: str | Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Patch:
    """Compute the patch that makes `model` say every fact's target. The model is left bit for bit as it was.

    Args:
        model: a causal language model of transformers, on any device.
        tokenizer: its fast tokenizer.
        facts: `Fact`s, or mappings with at least prompt, subject and target_new.
        method: one of `patchkit methods`; alphaedit when neither method nor recipe says otherwise.
        recipe: a recipe file, or the name of one under recipes/<method>/.
        set: overrides in the form "key=value", such as "layers=4-8" or "value.steps=30".
        text: a UTF-8 text file for the statistics; without it a small English one that comes with patchkit.
        stats: folder for the statistics instead of the user's cache.
        progress: called with (phase, done, total).

    Raises:
        InputError: a fact, the recipe, the text or the model cannot be used; the message says which and why.
    """
    name = str(model.config._name_or_path)
    check_tokenizer(tokenizer, name)
    config = load_recipe(method, recipe, set)
    known = parse_facts(facts, token_count=lambda target: count_tokens(tokenizer, target)).facts
    for fact in known:  # what cannot be tokenised should be known before minutes of statistics
        build_request(fact, tokenizer)
    with frozen(model):
        runner = LayerRunner(inspect_model(model))
        how = plan(runner.arch, config)
        corpus = read_corpus(text or default_text(name), tokenizer, window=window_of(model))
        needed = how.sites if methods.get(config.method).needs_statistics else ()
        place = Path(stats) if stats else None
        covariances = (
            statistics(runner, needed, corpus, place, lambda a, b: progress("statistics", a, b)) if needed else {}
        )
        state = edit(runner, tokenizer, known, config, covariances, progress)
    return _Made(runner, known, config, how, corpus, state).patch()


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


@dataclass(frozen=True)
class _Made:
    """What a run had in hand when it ended, on its way into a patch."""

    runner: LayerRunner
    facts: Sequence[Fact]
    config: EditConfig
    plan: Plan
    corpus: Corpus
    state: EditState

    def patch(self) -> Patch:
        model = self.runner.arch.model
        assert isinstance(model, PreTrainedModel)
        names = {site.layer: disk_name(model, site.weight_name) for site in self.plan.sites}
        updates = {names[layer]: delta.to(torch.float32) for layer, delta in self.state.deltas.items()}
        tensors = {"values.targets": self._values("targets"), "values.start": self._values("start")}
        for layer, name in names.items():
            tensors[f"{name}.keys"] = self.state.keys[layer].float().contiguous()
            tensors[f"{name}.residuals"] = self.state.residuals[layer].float().contiguous()
        base = BaseInfo(
            name=model_name(model),
            commit=getattr(model.config, "_commit_hash", None),
            architecture=type(model).__name__,
            weights={names[site.layer]: weight_digest(site, names[site.layer]) for site in self.plan.sites},
        )
        manifest = Manifest(
            base=base,
            facts=tuple(self._edited()),
            updates=tuple(
                self._update(names[site.layer], site.module, updates[names[site.layer]]) for site in self.plan.sites
            ),
            history=(self._run(),),
            digest=updates_digest(updates),
        )
        return Patch(manifest, updates, tensors)

    def _values(self, name: str) -> torch.Tensor:
        return torch.cat([getattr(v, name) for v in self.state.values], 1).float().cpu().contiguous()

    def _edited(self) -> Iterable[EditedFact]:
        batches = [i for i, size in enumerate(self.state.batches) for _ in range(size)]
        losses = torch.cat([v.loss for v in self.state.values]).tolist()
        steps = torch.cat([v.steps for v in self.state.values]).tolist()
        for fact, batch, loss, count in zip(self.facts, batches, losses, steps, strict=True):
            yield EditedFact(**fact.model_dump(), run=0, batch=batch, target_loss=loss, steps=count)

    def _update(self, name: str, module: torch.nn.Module, delta: Delta) -> UpdateInfo:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        shape = (delta.left.shape[0], delta.right.shape[1])
        return UpdateInfo(
            weight=name,
            rank=delta.rank,
            shape=shape,
            norm=delta.norm(),
            weight_norm=float(weight.detach().float().norm()),
        )

    def _run(self) -> Run:
        return Run(
            action="apply",
            when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            method=self.config.method,
            paper=methods.get(self.config.method).paper,
            recipe=self.config.model_dump(),
            recipe_digest=self.config.digest(),
            facts=tuple(fact.id for fact in self.facts),
            batches=tuple(self.state.batches),
            layers=tuple(self.plan.layers),
            value_at=self.plan.value_at,
            contexts=tuple(self.state.contexts),
            text={"source": Path(self.corpus.source).name, "sha256": self.corpus.digest, "tokens": self.corpus.tokens},
            seconds={phase: round(spent, 3) for phase, spent in self.state.seconds.items()},
            versions={
                "patchkit": version("patchkit"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "device": str(self.runner.device),
                "dtype": str(next(self.runner.arch.model.parameters()).dtype).removeprefix("torch."),
            },
        )
