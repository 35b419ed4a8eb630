"""Questions that a manifest answers: which facts are new, which a revert means, what a run did, how two patches differ.

Nothing here looks at a tensor or a model.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from patchkit.errors import InputError
from patchkit.facts.schema import Fact, FactFile
from patchkit.facts.text import same_wording
from patchkit.patch.manifest import EditedFact, Manifest, Run
from patchkit.words import beginning, listed

# --- the columns of the state -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SolveRecord:
    """One solve at one site: its columns among the site's keys and residuals, the id of each column's fact, and the
    column where its batch begins. All columns before that one are keys of earlier edits."""

    run: int
    batch: int
    sweep: int
    facts: tuple[str, ...]
    columns: range
    batch_start: int


def solve_records(manifest: Manifest, layer: int) -> Iterator[SolveRecord]:
    """The solves at `layer` whose facts are still in the patch, in the order in which they were made.

    Which facts a batch has is read from `facts` (run, batch), and how many sweeps it had from the recipe.
    """
    batches: dict[tuple[int, int], list[str]] = {}
    for fact in manifest.facts:
        if layer in (fact.layers or manifest.history[fact.run].layers):
            batches.setdefault((fact.run, fact.batch), []).extend([fact.id] * fact.columns)
    start = 0
    for (run, batch), facts in batches.items():
        batch_start = start
        for sweep in range(int(manifest.history[run].recipe.get("sweeps", 1))):
            yield SolveRecord(run, batch, sweep, tuple(facts), range(start, start + len(facts)), batch_start)
            start += len(facts)


# --- continuing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Incoming:
    """New facts sorted against those of a patch.

    Attributes:
        new: the facts to write.
        skipped: id of a fact that the patch has already -> the id that it has there.
        superseded: id of an earlier fact -> id of the new one with the same prompt and another target.
    """

    new: tuple[Fact, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    superseded: Mapping[str, str] = field(default_factory=dict)


def with_free_ids(read: FactFile, present: Sequence[EditedFact]) -> FactFile:
    """The facts of a file, with ids that no other fact in a patch has, nor one that was superseded and may come back.

    A number is a data set's own count, and the next file counts from 0 again: where it is taken, the file's name comes
    before it, and a digest of the fact after it if that is taken too.

    Args:
        present: the facts in the patch, and those that were superseded.

    Raises:
        InputError: an id that is no number is that of a fact with another prompt; all are named.
    """
    taken, free, clashes = {fact.id: fact for fact in present}, list[Fact](), list[str]()
    for fact, line in zip(read.facts, read.lines, strict=True):
        other = taken.get(fact.id)
        if other is None or same_wording(other.prompt) == same_wording(fact.prompt):
            free.append(fact)
        elif re.fullmatch(r"\d+(\.\d+)*", fact.id):
            free.append(fact.model_copy(update={"id": _numbered_by_file(fact, read.path, taken)}))
        else:
            place = f"facts[{line}]" if read.path == "facts" else f"{read.path} line {line}"
            clashes.append(f'{place}: fact {fact.id}: the patch has that id for "{other.prompt}"')
    if clashes:
        advice = "give the new fact another id, or the old one's prompt if it is to supersede it"
        raise InputError("\n".join(clashes) + f"; {advice}")
    return replace(read, facts=tuple(free))


def _numbered_by_file(fact: Fact, path: str, taken: Collection[str]) -> str:
    stem = Path(path).name.strip("<>").partition(".")[0]
    name, digest = f"{stem}-{fact.id}", sha256(f"{fact.prompt} {fact.target_new}".encode()).hexdigest()
    return name if name not in taken else f"{name}-{digest[:6]}"


def sort_incoming(facts: Sequence[Fact], present: Sequence[EditedFact]) -> Incoming:
    """Sort `facts`, whose ids are free, against the facts `present` in a patch.

    Two facts are about the same thing if their prompts are equal but for whitespace.
    """
    by_prompt = {same_wording(fact.prompt): fact for fact in present}
    new, skipped, superseded = list[Fact](), dict[str, str](), dict[str, str]()
    for fact in facts:
        old = by_prompt.get(same_wording(fact.prompt))
        if old is not None and old.target_new == fact.target_new:
            skipped[fact.id] = old.id
            continue
        if old is not None:
            superseded[old.id] = fact.id
            fact = with_checks_of(old, fact)
        new.append(fact)
    return Incoming(tuple(new), skipped, superseded)


def with_checks_of(old: Fact, new: Fact) -> Fact:
    """The fact in the place of another one, with what that one was checked by and still is one: other wordings of the
    prompt and neighbors. What follows from the old target, and its other names, are no checks of the new one."""
    checks = {
        name: (*getattr(new, name), *(each for each in getattr(old, name) if each not in getattr(new, name)))
        for name in ("paraphrases", "questions", "about", "locality")
    }
    return new.model_copy(update=checks)


# --- reverting --------------------------------------------------------------------------------------------------------


def choose_facts(
    manifest: Manifest,
    ids: Sequence[str] = (),
    since: str | None = None,
    last: int | None = None,
    subjects: Sequence[str] = (),
) -> tuple[str, ...]:
    """Ids of the facts in the patch that are named in `ids`, are the only one about one of `subjects`, or were added
    since a date or by the last runs.

    Args:
        since: an ISO date or time; UTC unless it says otherwise.
        last: how many of the latest runs that added facts.

    Raises:
        InputError: nothing asked for, an id, subject or date that cannot be used, or no fact left of those runs.
    """
    ids = (*ids, *(_about(manifest, subject) for subject in subjects))
    if not ids and since is None and last is None:
        raise InputError("revert: nothing chosen; give --fact ID, --subject NAME, --since DATE or --last N")
    named = leave(manifest, _later_first(manifest, ids)) if ids else None
    adding = [i for i, run in enumerate(manifest.history) if run.action == "apply"]
    runs: set[int] = set()
    if since is not None:
        moment = _moment(since)
        runs.update(i for i in adding if datetime.fromisoformat(manifest.history[i].when) >= moment)
    if last is not None:
        runs.update(adding[-last:] if last > 0 else ())
    chosen = [fact.id for fact in manifest.facts if fact.id in ids or fact.run in runs]
    if not chosen:
        newest = manifest.history[adding[-1]].when if adding else "never"
        raise InputError(f"revert: no fact of those runs is in the patch; facts were last added {newest}")
    chosen += [manifest.superseded[place].id for place in named.dropped] if named else []
    # A fact that would come back goes as well where a run to be undone has written it, and so on.
    while too := [
        fact.id for place in leave(manifest, chosen).back if (fact := manifest.superseded[place]).run in runs
    ]:
        chosen += too
    return tuple(chosen)


def _about(manifest: Manifest, subject: str) -> str:
    """The id of the only fact about a subject, which may be written in other case."""
    told: dict[str, list[EditedFact]] = {}
    for fact in manifest.facts:
        told.setdefault(_plain(fact.subject), []).append(fact)
    found = told.get(_plain(subject), [])
    if len(found) == 1:
        return found[0].id
    if not found:
        near = difflib.get_close_matches(_plain(subject), told, 5, 0.4)
        names = listed([told[name][0].subject for name in near])
        raise InputError(f'no fact about "{subject}" in the patch; {_near(names)} (`patchkit show` lists all)')
    lines = [f"  {fact.id}  {beginning(fact.prompt)} -> {beginning(fact.target_new)}" for fact in found]
    every = " ".join(f"--fact {shlex.quote(fact.id)}" for fact in found)
    advice = f"name those that are to go, or take out all of them: {every}"
    raise InputError("\n".join([f'{len(found)} facts are about "{subject}"; {advice}', *lines]))


def _plain(subject: str) -> str:
    return same_wording(subject).casefold()


def _near(names: str) -> str:
    return f"near it: {names}" if names else "none is near it"


@dataclass(frozen=True)
class Leaving:
    """What reverting facts means: ids of facts that go; places in `Manifest.superseded` of facts that come back in
    their stead, and of those that would have and go too."""

    gone: tuple[str, ...]
    back: tuple[int, ...]
    dropped: tuple[int, ...]


def leave(manifest: Manifest, ids: Iterable[str]) -> Leaving:
    """Revert facts one after the other: in the place of each comes the one that it had superseded, if any, which goes
    too if its id is named after it.

    Raises:
        InputError: an id is that of no fact in the patch by then.
    """
    there, gone = {fact.id for fact in manifest.facts}, list[str]()
    back, dropped = dict[str, int](), list[int]()
    for fact_id in ids:
        before = len(manifest.superseded)
        if fact_id in back:
            before = back.pop(fact_id)
            dropped.append(before)
        elif fact_id in there:
            there.discard(fact_id)
            gone.append(fact_id)
        else:
            _require(manifest, fact_id, there)
        earlier = [place for place, fact in enumerate(manifest.superseded[:before]) if fact.by == fact_id]
        if earlier and manifest.superseded[earlier[-1]].id not in there:  # which another fact may have by now
            back[manifest.superseded[earlier[-1]].id] = earlier[-1]
    return Leaving(tuple(gone), tuple(back.values()), tuple(dropped))


def _later_first(manifest: Manifest, ids: Iterable[str]) -> list[str]:
    """Ids in an order in which `leave` can take them: facts in the patch, then superseded ones, the last one first."""
    there, waiting = {fact.id for fact in manifest.facts}, [fact.id for fact in manifest.superseded]
    superseded = {name: place for place, name in enumerate(waiting, 1) if name not in there}
    return sorted(dict.fromkeys(ids), key=lambda name: -superseded.get(name, len(waiting) + 1))


def import_chosen(manifest: Manifest, ids: Sequence[str], since: str | None, last: int | None) -> bool:
    """Whether these choices of `choose_facts` mean an imported change, which has no facts and goes as a whole.

    Raises:
        InputError: a fact of it is named, or a date before which it was imported.
    """
    if not manifest.imported:
        return False
    run = next(run for run in reversed(manifest.history) if run.source)
    if ids or (since is not None and datetime.fromisoformat(run.when) < _moment(since)):
        raise InputError(f"revert: the patch was imported {run.when} and goes only as a whole; --last 1 takes it out")
    return since is not None or last is not None


def _require(manifest: Manifest, fact_id: str, there: Collection[str]) -> None:
    """Raises InputError: there is no such fact, or not any more."""
    known = {fact.id: fact for fact in manifest.facts if fact.id in there}
    left = [i for i, run in enumerate(manifest.history, 1) if any(fact.id == fact_id for fact in run.removed)]
    if left:
        raise InputError(f'no fact "{fact_id}" in the patch any more: run {left[-1]} took it out')
    near = difflib.get_close_matches(fact_id, known, 5, 0.4) or list(known)[:5]
    hint = f"near it: {listed([known[name].in_short for name in near])}" if near else "it holds none at all"
    if _plain(fact_id) in (_plain(fact.subject) for fact in known.values()):
        hint = f"it is a subject: give --subject {shlex.quote(fact_id)}"
    raise InputError(f'no fact "{fact_id}" in the patch; {hint} (`patchkit show` lists all)')


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise InputError(f"--since {text}: not a date; write 2026-01-31 or 2026-01-31T12:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


# --- showing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactChanges:
    """Facts that one run added, superseded (old, new), reverted, and brought back."""

    added: tuple[EditedFact, ...]
    superseded: tuple[tuple[EditedFact, EditedFact], ...]
    reverted: tuple[EditedFact, ...]
    restored: tuple[EditedFact, ...]


def fact_changes(manifest: Manifest, number: int) -> FactChanges:
    """What run `number`, from 0, did to the facts. Facts that left later are found in the run that took them out."""
    run = manifest.history[number]
    ever = (*manifest.facts, *(fact for later in manifest.history for fact in later.removed))
    written = {fact.id: fact for fact in ever if fact.run == number}
    known = {fact.id: fact for fact in ever if fact.run < number}
    pairs = tuple((old, written[run.superseded[old.id]]) for old in run.removed if old.id in run.superseded)
    replacing = {new.id for _, new in pairs}
    return FactChanges(
        tuple(written[fact_id] for fact_id in run.facts if fact_id in written.keys() - replacing),
        pairs,
        tuple(fact for fact in run.removed if fact.id not in run.superseded),
        tuple(known[fact_id] for fact_id in run.restored if fact_id in known),
    )


class ChangedTarget(BaseModel):
    """A prompt that two patches complete differently."""

    model_config = ConfigDict(frozen=True)
    prompt: str
    a: EditedFact
    b: EditedFact


class Difference(BaseModel):
    """What `patchkit diff --json` prints: facts, update norms by weight (relative to the weight's) and metrics."""

    model_config = ConfigDict(frozen=True)
    same_base: bool
    only_a: tuple[EditedFact, ...]
    only_b: tuple[EditedFact, ...]
    changed: tuple[ChangedTarget, ...]
    same: int
    updates: dict[str, tuple[float | None, float | None]]
    methods: tuple[tuple[str, ...], tuple[str, ...]]
    metrics: tuple[dict[str, Any] | None, dict[str, Any] | None]


def difference(a: Manifest, b: Manifest) -> Difference:
    """How patch `b` differs from patch `a`; facts are matched by their prompts."""
    in_a, in_b = ({fact.prompt: fact for fact in manifest.facts} for manifest in (a, b))
    both = [(in_a[prompt], in_b[prompt]) for prompt in in_a if prompt in in_b]
    changed = tuple(ChangedTarget(prompt=x.prompt, a=x, b=y) for x, y in both if x.target_new != y.target_new)
    norms = [{u.weight: u.share for u in manifest.updates} for manifest in (a, b)]
    weights = a.base.weights.keys() & b.base.weights.keys()
    return Difference(
        same_base=a.base.architecture == b.base.architecture
        and all(a.base.weights[name] == b.base.weights[name] for name in weights),
        only_a=tuple(fact for prompt, fact in in_a.items() if prompt not in in_b),
        only_b=tuple(fact for prompt, fact in in_b.items() if prompt not in in_a),
        changed=changed,
        same=len(both) - len(changed),
        updates={name: (norms[0].get(name), norms[1].get(name)) for name in {**norms[0], **norms[1]}},
        methods=(_methods(a.history), _methods(b.history)),
        metrics=(a.history[-1].metrics, b.history[-1].metrics),
    )


def _methods(history: Iterable[Run]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.method for run in history))
