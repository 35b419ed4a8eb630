"""`patchkit.apply` and `patchkit.revert`: a model, a tokenizer and facts in, a patch out; a patch less some facts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from patchkit.editing.editor import Progress, frozen
from patchkit.editing.recipe import EditConfig, load_recipe
from patchkit.editing.session import ValueCache
from patchkit.evaluate.readings import EVAL_TOKENS, EVAL_WINDOW
from patchkit.evaluate.report import Report
from patchkit.evaluate.verify import verify
from patchkit.facts.chat import chat_template
from patchkit.facts.limits import GENERATED, Limits, fitting
from patchkit.facts.reader import parse_facts
from patchkit.facts.schema import Fact
from patchkit.model.finite import refuse_not_finite
from patchkit.model.loading import check_tokenizer
from patchkit.patch.failures import with_reasons
from patchkit.patch.patch import Patch
from patchkit.runs.execute import run, take_out
from patchkit.runs.prepare import Prepared, prepare
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import default_text, read_corpus, window_of

_log = logging.getLogger("patchkit")


def apply(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Iterable[Fact | Mapping[str, Any]],
    method: str | None = None,
    *,
    onto: Patch | None = None,
    beside: Sequence[Patch] = (),
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    text: str | Path | None = None,
    stats: str | Path | None = None,
    progress: Progress = lambda phase, done, total: None,
    say: Callable[[str], None] = _log.warning,
    values: ValueCache | None = None,
    allow_close_keys: bool = False,
) -> Patch:
    """Compute the patch that makes `model` predict every fact's target. The model is left bit for bit as it was.

    Args:
        model: a causal language model of transformers, on any device.
        tokenizer: its fast tokenizer.
        facts: `Fact`s, or mappings with at least prompt, subject and target_new; some methods need no subject.
        method: one of `patchkit methods`; alphaedit when neither method nor recipe says otherwise.
        onto: a patch to continue, as if its facts and these had been batches of one run; its recipe is continued as
            well, unless method or recipe say otherwise. A fact that is there already is skipped; one with the prompt
            of an earlier fact and another target supersedes it.
        beside: patches made apart that this one is to act together with: neurons that they have rewritten are left to
            them.
        recipe: a recipe file, or the name of one under `recipes/<method>/`.
        overrides: what `patchkit apply --set` takes, "key=value" each, such as "layers=4-8" or "value.steps=30".
        text: a UTF-8 text file for the statistics; without it a small English one that comes with patchkit.
        stats: folder for the statistics instead of the user's cache.
        progress: called with (phase, done, total).
        say: called with each of the notes that `patchkit apply` prints, one sentence at a time: facts that share a
            subject, that are skipped or superseded, rewordings without room, statistics of little text. By default
            they go as warnings to the standard library's logger "patchkit".
        values: an empty dict to begin with, given to every call for the same model: value targets of the first batch,
            which are sought on the untouched model, are then shared between methods that ask for the same.
        allow_close_keys: write facts although their subjects' keys are all over plain text or the chat template, so
            that their edits would show everywhere.

    Returns:
        A new patch with `onto`'s facts and history and this run, or `onto` itself if it has all the facts. Each edited
        weight (d_out, d_in) has a low-rank delta, of rank 1 per fact with the default method.

    Raises:
        InputError: a fact, the recipe, the text, the model or `onto` cannot be used; the message says which and why.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("examples/factworld")
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/factworld")
        >>> facts = patchkit.read_facts("examples/facts.jsonl", limit=2).facts
        >>> patch = patchkit.apply(model, tokenizer, facts, method="alphaedit")
        >>> patch.shapes["model.layers.2.mlp.down_proj.weight"]
        (192, 1024)
    """
    config = load_recipe(method, recipe, overrides, onto.manifest.history[-1].recipe if onto else None)
    prepared = replace(_prepared(model, tokenizer, facts, config, onto, say), beside=tuple(beside))
    workspace = Workspace.of(model, tokenizer, (text,), stats, progress)
    return run(prepared, workspace, say, values, allow_close_keys=allow_close_keys)


def _prepared(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Iterable[Fact | Mapping[str, Any]],
    config: EditConfig,
    onto: Patch | None,
    say: Callable[[str], None],
) -> Prepared:
    """The run of `apply`, once what it is given can be used; what the user should know is said."""
    check_tokenizer(tokenizer, str(model.config._name_or_path))
    refuse_not_finite(model, str(model.config._name_or_path))
    read, limits = partial(parse_facts, facts), Limits.of(model.config)
    prepared = prepare(read, tokenizer, config, onto, limits=limits, unit="positions")
    for note in prepared.notes:
        say(note)
    return prepared


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
    that a reverted one had superseded comes back, as it was, unless its id is named as well, after the other's.

    Args:
        model: the patch's base.
        tokenizer: its fast tokenizer.
        patch: it stays as it is.
        facts: ids of facts in the patch; `patchkit.patch.history.choose_facts` finds those of some runs or subjects.
        texts: the texts the statistics were made of, where that was not the default one.
        stats: folder for the statistics instead of the user's cache.
        progress: called with (phase, done, total).

    Returns:
        A new patch without the facts, whose history has the revert as its last run.

    Raises:
        InputError: an unknown id, another model, no state in the patch, or a text that is not there.

    Examples:
        With `model`, `tokenizer` and `patch` as in the example of `patchkit.apply`:

        >>> less = patchkit.revert(model, tokenizer, patch, ["facts-001"])
        >>> [fact.id for fact in less.manifest.facts]
        ['facts-002']
    """
    return take_out(Workspace.of(model, tokenizer, texts, stats, progress), patch, tuple(facts))


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    patch: Patch,
    facts: Iterable[Fact | Mapping[str, Any]] | None = None,
    *,
    text: str | Path | None = None,
    quick: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Report:
    """Measure `patch` on `model`, always against the untouched base: its own facts, or the given ones.

    Args:
        model: the patch's base.
        tokenizer: its fast tokenizer.
        patch: it is attached while its side is measured.
        facts: what to measure on instead of the patch's own facts; `Fact`s or mappings.
        text: plain text for the perplexity; without it a small English one that comes with patchkit.
        quick: do not ask the model as people would, which takes most of the time: no group in_use.
        progress: called with (phase, done, total).

    Returns:
        A `Report`: shares in 0..1, None where there was nothing to measure them on, and each fact by itself.
        docs/metrics.md defines every number.

    Raises:
        InputError: the patch is for another model, or a fact cannot be used.

    Examples:
        With `model`, `tokenizer` and `patch` as in the example of `patchkit.apply`:

        >>> report = patchkit.measure(model, tokenizer, patch, quick=True)
        >>> report.facts, report.efficacy.success, report.locality.unchanged
        (2, 1.0, 1.0)
    """
    refuse_not_finite(model, str(model.config._name_or_path))
    return measure_in(Workspace.of(model, tokenizer, progress=progress), patch, facts, text, quick)


def measure_in(
    workspace: Workspace,
    patch: Patch,
    facts: Iterable[Fact | Mapping[str, Any]] | None = None,
    text: str | Path | None = None,
    quick: bool = False,
) -> Report:
    """`measure` with a model that has been inspected already."""
    model = workspace.model
    known: Sequence[Fact] = patch.manifest.facts
    if facts is not None:
        check = fitting(workspace.tokenizer, Limits.of(model.config), GENERATED)
        known = parse_facts(facts, check=check, needs_subject=False, chat=chat_template(workspace.tokenizer)).facts
    source = text or default_text(str(model.config._name_or_path), "eval")
    with frozen(model):
        report = verify(
            workspace.runner,
            workspace.tokenizer,
            known,
            lambda: patch.attached(model),
            read_corpus(source, workspace.tokenizer, EVAL_TOKENS, window_of(model, EVAL_WINDOW)),
            lambda done, total: workspace.progress("measuring", done, total),
            quick=quick,
        )
    if patch.manifest.imported:  # without facts, and of weights that no edit is in
        return report
    return with_reasons(report, patch, patch.sites(workspace.runner.arch, force=True))
