"""The jobs behind the commands, from file to file: apply facts, revert, verify a patch, compute statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.api import apply, count_tokens, measure, revert
from patchkit.arch import inspect_model
from patchkit.editor import Progress, plan
from patchkit.errors import GateError
from patchkit.facts import Fact, read_facts, write_rejected
from patchkit.forward import LayerRunner
from patchkit.history import Incoming, choose_facts, sort_incoming
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
    incoming: Incoming

    @property
    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def as_json(self) -> str:
        """One JSON object for machines."""
        made: dict[str, Any] = {"patch": str(self.folder), "bytes": self.size, "digest": self.patch.manifest.digest}
        if self.patch.manifest.parents:
            added = [fact.id for fact in self.incoming.new]
            made |= {"added": added, "skipped": self.incoming.skipped, "superseded": self.incoming.superseded}
        return json.dumps({**made, **self.report.model_dump(mode="json")})


def apply_file(
    facts: str,
    choose: Callable[[str | None], ModelChoice],
    folder: Path,
    *,
    onto: str | None,
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
    """Read a fact file, edit, measure, write the patch's folder. `choose` is told the base of `onto`, if any.

    Raises:
        InputError: anything about the input; nothing has been written then.
    """
    earlier = Patch.load(onto) if onto else None
    last = earlier.manifest.history[-1] if earlier else None
    # A bad recipe or fact file should not wait for a model to load.
    load_recipe(method, recipe, settings, last.recipe if last else None)
    chosen = choose(earlier.manifest.base.name if earlier else None)
    tokenizer = load_tokenizer(chosen.name)
    read = read_facts(
        facts,
        zsre_target=zsre_target,
        skip_bad=skip_bad,
        token_count=lambda target: count_tokens(tokenizer, target),
    )
    incoming = sort_incoming(read.facts, earlier.manifest.facts if earlier else ())
    _tell_incoming(incoming, say)
    loaded = load_model(chosen.name, chosen.device, chosen.dtype)
    source = Path(text) if text else default_text(loaded.name)
    if source == PACKAGE_TEXT:
        say(SMALL_TEXT)
    patch = apply(
        loaded.model,
        loaded.tokenizer,
        read.facts,
        method,
        onto=earlier,
        recipe=recipe,
        set=settings,
        text=source,
        stats=stats,
        progress=progress,
    )
    if last and patch.manifest.history[-1].text["sha256"] != last.text["sha256"]:
        say(f"statistics: from {source.name}, unlike those of the patch's last run ({last.text['source']}): see --text")
    report = measure(loaded.model, loaded.tokenizer, patch, progress=progress)
    patch = patch.with_metrics(report.summary())
    patch.save(folder)
    if read.rejected:
        write_rejected(folder / "rejected.jsonl", read.rejected)
        say(f"{len(read.rejected)} bad facts left out: {folder / 'rejected.jsonl'}")
    return Applied(patch, report, folder, incoming)


def _tell_incoming(incoming: Incoming, say: Callable[[str], None]) -> None:
    if incoming.skipped:
        say(f"already in the patch, skipped: {_shortened(incoming.skipped)}")
    if incoming.superseded:
        say(f"superseded: {_shortened([f'{old} by {new}' for old, new in incoming.superseded.items()])}")


def _shortened(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class Reverted:
    """What `patchkit revert` made."""

    patch: Patch
    report: Report | None
    folder: Path

    def as_json(self) -> str:
        """One JSON object for machines."""
        manifest = self.patch.manifest
        made = {"patch": str(self.folder), "digest": manifest.digest, "reverted": manifest.history[-1].facts}
        report = self.report.model_dump(mode="json") if self.report else {"facts": len(manifest.facts)}
        return json.dumps({**made, **report})


def revert_patch(
    name: str,
    choose: Callable[[str], ModelChoice],
    folder: Path,
    *,
    facts: Sequence[str],
    since: str | None,
    last: int | None,
    texts: Sequence[str],
    stats: str | None,
    measured: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Reverted:
    """Take facts out of a patch and write what remains to `folder`, with its metrics if they are asked for.

    Raises:
        InputError: anything about the input; nothing has been written then.
    """
    patch = Patch.load(name)
    gone = choose_facts(patch.manifest, facts, since, last)
    chosen = choose(patch.manifest.base.name)
    loaded = load_model(chosen.name, chosen.device, chosen.dtype)
    less = revert(loaded.model, loaded.tokenizer, patch, gone, texts=texts, stats=stats, progress=progress)
    report = measure(loaded.model, loaded.tokenizer, less, progress=progress) if measured else None
    less = less.with_metrics(report.summary()) if report else less
    less.save(folder)
    replaced = {new: old for run in patch.manifest.history for old, new in run.superseded.items()}
    if back := [replaced[fact_id] for fact_id in gone if fact_id in replaced]:
        say(f"superseded earlier and not brought back: {_shortened(back)}; apply them again if they should hold")
    return Reverted(less, report, folder)


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
    known: tuple[Fact, ...] | None = None
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
