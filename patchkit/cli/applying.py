"""What `patchkit apply` does, from a file of facts to the patch's folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

from patchkit import methods
from patchkit.api import measure_in
from patchkit.cli.jobs import in_place
from patchkit.editing.editor import Progress
from patchkit.editing.recipe import load_recipe
from patchkit.errors import InputError
from patchkit.evaluate.report import Report
from patchkit.facts.limits import Limits
from patchkit.facts.reader import read_facts, read_typed, write_rejected
from patchkit.facts.schema import FactFile
from patchkit.model.loading import LoadedModel, ModelChoice
from patchkit.patch.bases import public_argument
from patchkit.patch.history import Incoming
from patchkit.patch.manifest import BaseInfo, Origin
from patchkit.patch.patch import OWN_FILES, Patch
from patchkit.ranks import world
from patchkit.report.kept import keep_page
from patchkit.runs.dry_run import PlannedRun, planned
from patchkit.runs.execute import run
from patchkit.runs.guard import Bounds, Guard
from patchkit.runs.journals import forget
from patchkit.runs.prepare import Prepared, prepare
from patchkit.runs.retry import Retried, retried
from patchkit.runs.subjects import SubjectFinder
from patchkit.runs.tally import Tally
from patchkit.runs.workspace import Workspace
from patchkit.words import beginning, counted, listed


@dataclass(frozen=True)
class Applied:
    """What `patchkit apply` made."""

    patch: Patch
    report: Report
    folder: Path
    incoming: Incoming
    base: str
    retried: tuple[str, ...] = ()
    """Ids of facts that did not hold at first and were edited once more."""
    stopped: str | None = None
    """Why the guard ended the run, if it did."""

    @property
    def size(self) -> int:
        """Bytes of the patch's files."""
        return sum(file.stat().st_size for name in OWN_FILES if (file := self.folder / name).is_file())

    def as_json(self, more: Mapping[str, Any]) -> str:
        """One JSON object for machines, with what else was made of the patch."""
        made: dict[str, Any] = {"patch": str(self.folder), "bytes": self.size, "digest": self.patch.manifest.digest}
        if self.patch.manifest.parents:
            added = [fact.id for fact in self.incoming.new]
            made |= {
                "added": added,
                "skipped": [*self.incoming.skipped.values()],
                "superseded": self.incoming.superseded,
            }
        made |= {"retried": self.retried} if self.retried else {}
        made |= {"stopped": self.stopped} if self.stopped else {}
        return json.dumps({**made, **self.report.model_dump(mode="json"), **more})


_SHOWN = 20
"""Proposed subjects printed before "and N more"."""


@dataclass(frozen=True)
class ApplyRequest:
    """What `patchkit apply` is asked to write, and how: facts in a file, or typed as `FORM`."""

    facts: str | Sequence[str]
    onto: str | None
    method: str | None
    recipe: str | None
    overrides: tuple[str, ...]
    zsre_target: Any
    skip_bad: bool
    yes: bool = False
    command: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def prepared(
        self, choose: Callable[[BaseInfo | None], ModelChoice], say: Callable[[str], None]
    ) -> tuple[Prepared, Callable[[], LoadedModel]]:
        """The run that can start, and what loads the model that it is for; `choose` is told the base of `onto`, if any.

        Raises:
            InputError: anything about the input.
        """
        earlier, others = Patch.load(self.onto) if self.onto else None, tuple(map(Patch.load, self.beside))
        # A bad recipe or fact file should not wait for a model to load.
        recipe = earlier.manifest.history[-1].recipe if earlier else None
        config = load_recipe(self.method, self.recipe, self.overrides, recipe, once=True)
        chosen = choose(earlier.manifest.base if earlier else None)
        read = (
            partial(read_facts, self.facts, zsre_target=self.zsre_target, skip_bad=self.skip_bad)
            if isinstance(self.facts, str)
            else partial(read_typed, self.facts, skip_bad=self.skip_bad)
        )
        limits, load = Limits.of(chosen.config()), cache(chosen.load)
        finder = SubjectFinder(load)
        tokenizer = chosen.tokenizer()
        prepared = prepare(read, tokenizer, config, earlier, limits=limits, find_subject=finder)
        self._confirm(world().from_first(lambda: dict(finder.proposed)), say)
        for note in prepared.notes:
            say(note)
        return replace(prepared, beside=others), load

    def _confirm(self, proposed: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Show the subjects that were proposed for facts without one; raises InputError unless they are taken."""
        lines = [f'no subject in "{beginning(prompt)}"; proposed: "{subject}"' for prompt, subject in proposed.items()]
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        if lines and not self.yes:
            free = listed([name for name in methods.available() if not methods.get(name).needs_subject])
            lines.append(
                f"name these subjects, take the proposed ones with --yes, or use a method without any ({free})"
            )
            raise InputError("\n".join(lines))
        for line in lines:
            say(line)


def dry_run(
    request: ApplyRequest,
    choose: Callable[[BaseInfo | None], ModelChoice],
    *,
    text: str | None,
    stats: str | None,
    quick: bool,
    began: float,
    say: Callable[[str], None],
) -> PlannedRun:
    """What `apply_file` would do with the same.

    Args:
        began: when the command began, by `time.process_time`: what it has read by then from disk need not be again.

    Raises:
        InputError: anything about the input.
    """
    prepared, load = request.prepared(choose, say)
    loaded = load()
    workspace = Workspace.of(loaded.model, loaded.tokenizer, (text,), stats)
    return planned(prepared, workspace, quick, time.process_time() - began)


def apply_file(
    request: ApplyRequest,
    choose: Callable[[BaseInfo | None], ModelChoice],
    folder: Path,
    *,
    text: str | None,
    stats: str | None,
    quick: bool,
    allow_close_keys: bool,
    progress: Progress,
    say: Callable[[str], None],
    check: Callable[[LoadedModel], object] = lambda model: None,
    bounds: Bounds | None = None,
    retry: bool = False,
) -> Applied | None:
    """Read the facts, edit, measure, write the patch's folder. Of processes that edit together the first one alone
    measures and writes, and has something to show; the others get None.

    Args:
        check: may refuse the model before any work is done with it.
        bounds: of the guard, which ends the run where the model goes wrong; None does without one.
        retry: edit facts that do not hold once more, with twice the steps.

    Raises:
        InputError: anything about the input; nothing has been written then.
        GateError: the guard ended the run before a fact could be kept; nothing has been written.
    """
    prepared, load = request.prepared(choose, say)
    loaded = load()
    check(loaded)
    workspace = Workspace.of(loaded.model, loaded.tokenizer, (text,), stats, progress)
    guard = None if bounds is None else Guard(workspace, bounds)
    tally = Tally(workspace, len(prepared.incoming.new), say)
    patch = run(prepared, workspace, say, None, folder, allow_close_keys, guard, tally)
    again = retried(prepared, workspace, patch, guard, quick, say) if retry else Retried(patch)
    patch = again.patch
    if not world().first:
        return None
    report = measure_in(workspace, patch, quick=quick)
    if known := _known_before(prepared, report):
        say(f"the base says the target already, so that an edit shows nothing there: {listed(known)}")
    origin = _origin(request.command, report, prepared.read) if prepared.incoming.new else None
    patch = patch.with_metrics(report.summary(), report.outcomes(), origin)
    _save(patch, folder, in_place(prepared.onto, request.onto, folder), prepared.read, say)
    keep_page(folder, patch.manifest, report, say)
    stopped = guard.message if guard else ""
    return Applied(patch, report, folder, prepared.incoming, loaded.name, again.facts, stopped or None)


def _origin(command: Sequence[str], report: Report, read: FactFile) -> Origin:
    """What a run was started from; of paths, which are nobody else's business, only the last parts."""
    return Origin(
        command=tuple(public_argument(each) for each in command),
        facts=PurePath(read.path).name if read.digest else None,
        facts_sha256=read.digest,
        report=hashlib.sha256(report.model_dump_json().encode()).hexdigest(),
    )


def _known_before(prepared: Prepared, report: Report) -> list[str]:
    """The new facts that the base needs no edit for, by line."""
    new = {fact.id for fact in prepared.incoming.new}
    lines = {fact.id: line for fact, line in zip(prepared.read.facts, prepared.read.lines, strict=True)}
    known = [each for each in report.per_fact if each.id in new and each.says_before.startswith(each.target_new)]
    return [f"line {lines[each.id]} ({each.id})" for each in known]


def _save(patch: Patch, folder: Path, over: Patch | None, read: FactFile, say: Callable[[str], None]) -> None:
    """Write the patch over the one it goes on from, if that is there, and beside it the facts that were left out."""

    def write_beside(into: Path) -> None:
        if read.rejected:
            write_rejected(into / "rejected.jsonl", read.rejected)

    patch.save(folder, over, write_beside)
    forget(folder)
    if read.rejected:
        say(f"{counted(len(read.rejected), 'bad fact')} left out: {folder / 'rejected.jsonl'}")
