"""What the commands do, from file to file: revert, verify and merge patches, locate facts, compute statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from patchkit.api import measure, measure_in
from patchkit.editing.editor import Progress, frozen
from patchkit.editing.neurons import settled
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.evaluate.report import Report
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import facts_held
from patchkit.export.merge import merge
from patchkit.export.record import MANIFEST, HeldFacts, Merged, Rounding
from patchkit.facts.chat import chat_template
from patchkit.facts.limits import GENERATED, Limits, fitting
from patchkit.facts.reader import read_facts
from patchkit.facts.schema import Fact
from patchkit.imports.assemble import without_import
from patchkit.io.files import finish_folder
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import ModelChoice, load_model
from patchkit.model.tuning import named, remember
from patchkit.patch.bases import public_name
from patchkit.patch.history import choose_facts, import_chosen
from patchkit.patch.manifest import BaseInfo
from patchkit.patch.patch import Patch
from patchkit.report.kept import keep_page
from patchkit.runs import tune
from patchkit.runs.execute import SMALL_TEXT, take_out
from patchkit.runs.locate import Located, locate
from patchkit.runs.train import TrainConfig, Trained, train
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import PACKAGE_TEXT, default_text, read_corpus, window_of
from patchkit.statistics.moments import statistics
from patchkit.statistics.text_gradients import text_gradients
from patchkit.words import counted, listed


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
    choose: Callable[[BaseInfo], ModelChoice],
    folder: Path,
    *,
    facts: Sequence[str],
    subjects: Sequence[str],
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
    if import_chosen(patch.manifest, (*facts, *subjects), since, last):
        less = without_import(patch)
        less.save(folder)
        return Reverted(less, None, folder)
    gone = choose_facts(patch.manifest, facts, since, last, subjects)
    chosen = choose(patch.manifest.base)
    loaded = chosen.load()
    workspace = Workspace.of(loaded.model, loaded.tokenizer, texts, stats, progress)
    less = take_out(workspace, patch, gone)
    report = measure_in(workspace, less) if measured else None
    less = less.with_metrics(report.summary(), report.outcomes()) if report else less
    less.save(folder, in_place(patch, name, folder))
    if report:
        keep_page(folder, less.manifest, report, say)
    restored = less.manifest.history[-1].restored
    if restored:
        say(f"superseded earlier, and back: {listed(restored)}")
    replaced = {new: old for run in patch.manifest.history for old, new in run.superseded.items()}
    if lost := [replaced[name] for name in gone if name in replaced and replaced[name] not in (*restored, *gone)]:
        say(f"superseded earlier and not brought back, the patch has not kept them: {listed(lost)}; apply them again")
    return Reverted(less, report, folder)


def in_place(patch: Patch | None, name: str | None, folder: Path) -> Patch | None:
    """The patch called `name`, if it is the one in `folder`."""
    return patch if name is not None and Path(name).resolve() == folder.resolve() else None


def verify_patch(
    folder: Path,
    choose: Callable[[BaseInfo], ModelChoice],
    *,
    facts: str | None,
    text: str | None,
    zsre_target: Any,
    skip_bad: bool,
    quick: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Report:
    """Measure the patch in `folder` on its own facts or on those of a file.

    Raises:
        InputError: the patch, the model or the facts cannot be used.
    """
    patch = Patch.load(folder)
    chosen = choose(patch.manifest.base)
    tokenizer = chosen.tokenizer()
    known: tuple[Fact, ...] | None = None
    if facts is not None:
        check = fitting(tokenizer, Limits.of(chosen.config()), GENERATED)
        read = read_facts(
            facts,
            zsre_target=zsre_target,
            skip_bad=skip_bad,
            check=check,
            needs_subject=False,
            chat=chat_template(tokenizer),
        )
        known = read.facts
        for note in (*read.notes, *([f"{counted(len(read.rejected), 'bad fact')} left out"] if read.rejected else [])):
            say(note)
    loaded = chosen.load()
    return measure(loaded.model, loaded.tokenizer, patch, known, text=text, quick=quick, progress=progress)


def locate_facts(
    facts: str,
    chosen: ModelChoice,
    *,
    count: int,
    noise: float,
    samples: int,
    seed: int,
    trial: int,
    zsre_target: Any,
    skip_bad: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Located:
    """Trace the first `count` facts of a file; arguments as in `patchkit.runs.locate.locate`.

    Raises:
        InputError: the facts or the model cannot be used.
    """
    check = fitting(chosen.tokenizer(), Limits.of(chosen.config()))
    read = read_facts(facts, zsre_target=zsre_target, skip_bad=skip_bad, check=check, limit=count)
    for note in read.notes:
        say(note)
    loaded = chosen.load()
    runner = LayerRunner(inspect_model(loaded.model))
    return locate(
        runner,
        loaded.tokenizer,
        read.facts,
        model=loaded.name,
        noise=noise,
        samples=samples,
        seed=seed,
        trial=trial,
        progress=progress,
    )


def tune_passes(chosen: ModelChoice, progress: Progress) -> tune.Found:
    """Measure passes of value steps where `apply` takes them by default, for later runs.

    Raises:
        InputError: the model cannot be used, or there is no memory.
    """
    runner = LayerRunner(inspect_model(chosen.load().model))
    with frozen(runner.arch.model):
        return tune.tune(runner, plan(runner.arch, load_recipe()).sites[-1].layer + 1, progress)


def forget_passes(chosen: ModelChoice) -> str:
    """Go back to what suits the kind of device; gives the device's name.

    Raises:
        InputError: the model cannot be used.
    """
    runner = LayerRunner(inspect_model(chosen.load().model))
    remember(runner.device, runner.arch.shape, None)
    return named(runner.device)


def train_network(
    facts: str,
    chosen: ModelChoice,
    how: TrainConfig,
    *,
    method: str,
    recipe: str | None,
    overrides: Sequence[str],
    text: str | None,
    stats: str | None,
    zsre_target: Any,
    skip_bad: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Trained:
    """Train a method's network on a file of facts; see `patchkit.runs.train.train`.

    Raises:
        InputError: the recipe, the facts or the model cannot be used.
    """
    config = load_recipe(method, recipe, overrides, once=True)
    check = fitting(chosen.tokenizer(), Limits.of(chosen.config()))
    read = read_facts(facts, zsre_target=zsre_target, skip_bad=skip_bad, check=check, needs_subject=False)
    for note in read.notes:
        say(note)
    loaded = chosen.load()
    workspace = Workspace.of(loaded.model, loaded.tokenizer, (text,), stats, progress)
    return train(workspace, read.facts, config, how, say)


def merge_patches(
    patches: Sequence[Patch],
    base: str,
    out: Path,
    *,
    rounding: Rounding | None = None,
    stats: str | None = None,
    force: bool = False,
    link: bool = False,
    ask: bool = True,
    say: Callable[[str], None],
) -> Merged:
    """Write `base` with `patches` merged into it to `out`; load it and ask it for every fact, unless told not to.

    Raises:
        InputError: anything about the input; nothing has been written then.
    """
    finish_folder(out)
    merged = _merged_before(patches, base, out, rounding, force) if ask else None
    if merged is None:
        merged = merge(patches, base, out, rounding=rounding, statistics=stats, force=force, link=link, say=say)
    if ask:
        merged = merged.model_copy(update={"facts": _held(out, patches)})
        merged.save(out, out.name)
    return merged


def _merged_before(
    patches: Sequence[Patch], base: str, out: Path, rounding: Rounding | None, force: bool
) -> Merged | None:
    """What the same merge has written to `out`, if it was cut off when all was written and the facts were to be asked
    for."""
    try:
        found = Merged.model_validate_json((out / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None
    parents = [patch.manifest.model_dump_json() for patch in patches]
    same = (found.base, found.forced) == (public_name(base), force)
    same = same and [manifest.model_dump_json() for manifest in found.parents] == parents
    rounded = rounding is None or all(tensor.rounding == rounding for tensor in found.tensors)
    return found if same and rounded and found.facts is None else None


def _held(folder: Path, patches: Sequence[Patch]) -> HeldFacts:
    """Ask the merged checkpoint for every fact; of two patches that answer one prompt, the later one counts."""
    loaded = load_model(str(folder))
    facts = {fact.prompt: fact for patch in patches for fact in patch.manifest.facts}
    holds = facts_held(Trial(LayerRunner(inspect_model(loaded.model)), loaded.tokenizer, tuple(facts.values())))
    lost = tuple(name for name, there in holds.items() if not there)
    return HeldFacts(asked=len(holds), hold=len(holds) - len(lost), lost=lost)


def compute_statistics(
    chosen: ModelChoice,
    *,
    text: str | None,
    out: str | None,
    layers: str | None,
    method: str | None,
    tokens: int,
    gradients: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> list[tuple[str, int, int, int | None]]:
    """Statistics of the sites a recipe edits: per site its weight's name, tokens seen and width; and with `gradients`
    the rank of the gradient of the text's loss there, which is then computed as well.

    Raises:
        InputError: the model, the text or the layers cannot be used.
    """
    config = load_recipe(method, None, [f"layers={layers}"] if layers else [])
    loaded = chosen.load()
    runner = LayerRunner(inspect_model(loaded.model))
    source = Path(text) if text else default_text(loaded.name)
    if source == PACKAGE_TEXT:
        say(SMALL_TEXT)
    corpus = read_corpus(source, loaded.tokenizer, tokens, window_of(loaded.model), config.uses_chat)
    sites = plan(runner.arch, settled(config, loaded.tokenizer, runner.arch)).sites
    place, ranks = Path(out) if out else None, dict[int, int]()
    found = statistics(runner, sites, corpus, place, lambda *at: progress("statistics", *at))
    if gradients:
        with frozen(loaded.model):
            of_text = text_gradients(runner, sites, corpus, place, lambda *at: progress("gradients", *at))
        ranks = {layer: len(each.values) for layer, each in of_text.items()}
    return [(site.weight_name, found[site.layer].tokens, site.d_in, ranks.get(site.layer)) for site in sites]
