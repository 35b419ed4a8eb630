"""The jobs behind the commands, from file to file: apply a fact file, verify a patch, compute statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.api import apply, count_tokens, measure
from patchkit.arch import inspect_model
from patchkit.editor import Progress, plan
from patchkit.errors import GateError
from patchkit.facts import Fact, read_facts, write_rejected
from patchkit.forward import LayerRunner
from patchkit.models import ModelChoice, load_model, load_tokenizer
from patchkit.patch import Patch
from patchkit.recipe import load_recipe
from patchkit.stats import PACKAGE_TEXT, default_text, read_corpus, statistics, window_of
from patchkit.verify import Report

SMALL_TEXT = "statistics: from the small English text that comes with patchkit; --text FILE with more text is better"


@dataclass(frozen=True)
class Applied:
    """What `patchkit apply` made."""

    patch: Patch
    report: Report
    folder: Path

    @property
    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def as_json(self) -> str:
        """One JSON object for machines."""
        report = self.report.model_dump(mode="json")
        return json.dumps(
            {"patch": str(self.folder), "bytes": self.size, "digest": self.patch.manifest.digest, **report}
        )


def apply_file(
    facts: str,
    chosen: ModelChoice,
    folder: Path,
    *,
    method: str | None,
    recipe: str | None,
    settings: tuple[str, ...],
    text: str | None,
    stats: str | None,
    zsre_target: Any,
    skip_bad: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Applied:
    """Read a fact file, edit, measure, write the patch's folder.

    Raises:
        InputError: anything about the input; nothing has been written then.
    """
    load_recipe(method, recipe, settings)  # a bad recipe or fact file should not wait for a model to load
    tokenizer = load_tokenizer(chosen.name)
    read = read_facts(
        facts,
        zsre_target=zsre_target,
        skip_bad=skip_bad,
        token_count=lambda target: count_tokens(tokenizer, target),
    )
    loaded = load_model(chosen.name, chosen.device, chosen.dtype)
    source = Path(text) if text else default_text(loaded.name)
    if source == PACKAGE_TEXT:
        say(SMALL_TEXT)
    patch = apply(
        loaded.model,
        loaded.tokenizer,
        read.facts,
        method,
        recipe=recipe,
        set=settings,
        text=source,
        stats=stats,
        progress=progress,
    )
    report = measure(loaded.model, loaded.tokenizer, patch, read.facts, progress=progress)
    patch = patch.with_metrics(report.summary())
    patch.save(folder)
    if read.rejected:
        write_rejected(folder / "rejected.jsonl", read.rejected)
        say(f"{len(read.rejected)} bad facts left out: {folder / 'rejected.jsonl'}")
    return Applied(patch, report, folder)


@dataclass(frozen=True)
class Gates:
    """Bounds of `patchkit verify`; None asks for nothing. Efficacy and generalization count exact matches."""

    efficacy: float | None = None
    generalization: float | None = None
    locality: float | None = None
    perplexity_ratio: float | None = None

    def check(self, report: Report) -> None:
        """Raises:
        GateError: at least one bound does not hold, or there is nothing to measure it on; all are named.
        """
        ratio = report.perplexity.ratio if report.perplexity else None
        held = (
            ("efficacy", report.efficacy.exact, self.efficacy, 1),
            ("generalization", report.generalization.success_or_exact, self.generalization, 1),
            ("locality", report.locality.unchanged, self.locality, 1),
            ("perplexity ratio", ratio, self.perplexity_ratio, -1),
        )
        failed = [
            f"{name} {'not measured' if value is None else format(value, '.4g')}, "
            f"asked for {'at least' if sign > 0 else 'at most'} {bound:g}"
            for name, value, bound, sign in held
            if bound is not None and (value is None or sign * (value - bound) < 0)
        ]
        if failed:
            raise GateError("gate failed: " + "; ".join(failed))


def verify_patch(
    folder: Path,
    choose: Callable[[str], ModelChoice],
    *,
    facts: str | None,
    text: str | None,
    zsre_target: Any,
    progress: Progress,
) -> Report:
    """Measure the patch in `folder` on its own facts or on those of a file.

    Raises:
        InputError: the patch, the model or the facts cannot be used.
    """
    patch = Patch.load(folder)
    chosen = choose(patch.manifest.base.name)
    tokenizer = load_tokenizer(chosen.name)
    known: tuple[Fact, ...] = patch.manifest.facts
    if facts is not None:
        known = read_facts(
            facts, zsre_target=zsre_target, token_count=lambda target: count_tokens(tokenizer, target)
        ).facts
    loaded = load_model(chosen.name, chosen.device, chosen.dtype)
    return measure(loaded.model, loaded.tokenizer, patch, known, text=text, progress=progress)


def compute_statistics(
    chosen: ModelChoice,
    *,
    text: str | None,
    out: str | None,
    layers: str | None,
    method: str | None,
    tokens: int,
    progress: Progress,
    say: Callable[[str], None],
) -> list[tuple[str, int, int]]:
    """Statistics of the sites a recipe edits: per site its weight's name, tokens seen and width.

    Raises:
        InputError: the model, the text or the layers cannot be used.
    """
    config = load_recipe(method, None, [f"layers={layers}"] if layers else [])
    loaded = load_model(chosen.name, chosen.device, chosen.dtype)
    runner = LayerRunner(inspect_model(loaded.model))
    source = Path(text) if text else default_text(loaded.name)
    if source == PACKAGE_TEXT:
        say(SMALL_TEXT)
    corpus = read_corpus(source, loaded.tokenizer, tokens, window_of(loaded.model))
    sites = plan(runner.arch, config).sites
    found = statistics(
        runner, sites, corpus, Path(out) if out else None, lambda done, total: progress("statistics", done, total)
    )
    return [(site.weight_name, found[site.layer].tokens, site.d_in) for site in sites]
