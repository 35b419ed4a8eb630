"""What a run will do, settled before anything costly: its recipe, its new facts, and what the user should know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from patchkit import methods
from patchkit.editing.recipe import EditConfig
from patchkit.editing.wordings import REWORDINGS
from patchkit.errors import InputError
from patchkit.facts.batches import batches
from patchkit.facts.chat import chat_template
from patchkit.facts.limits import Limits, fitting
from patchkit.facts.schema import Fact, FactFile
from patchkit.patch.history import Incoming, sort_incoming, with_free_ids
from patchkit.patch.patch import Patch
from patchkit.ranks import world
from patchkit.words import listed

CONTEXT_ROOM = 8
"""Tokens that a context before a prompt may have beside `context_length`: its opening word and its end."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start.

    Attributes:
        config: the recipe, with all overrides.
        read: the facts as read, with their places in the file and those that were refused.
        incoming: which of them are new, which `onto` has already, and which earlier facts they supersede.
        onto: the patch that the run continues, if any.
        notes: what the user should know before it starts, one sentence each.
        beside: patches that the new one is to act together with.
    """

    config: EditConfig
    read: FactFile
    incoming: Incoming
    onto: Patch | None
    notes: tuple[str, ...]
    beside: tuple[Patch, ...] = ()


def prepare(
    read: Callable[..., FactFile],
    tokenizer: Any,
    config: EditConfig,
    onto: Patch | None = None,
    *,
    limits: Limits,
    unit: str = "lines",
    find_subject: Callable[[str], str | None] | None = None,
) -> Prepared:
    """Read the facts and sort them against the patch that is continued.

    What the tokenizer or the model cannot take is known here, before minutes of statistics.

    Args:
        read: `read_facts` or `parse_facts` with everything but what the tokenizer, the model and the method decide.
        limits: what the model can take.
        unit: what `FactFile.lines` counts, for the notes.
        find_subject: proposes a subject for the prompt of a fact that names none.

    Raises:
        InputError: a fact cannot be used, or has the id of another one in `onto`; or `onto` was imported.
    """
    if onto and (source := onto.manifest.imported):
        raise InputError(
            f"the patch was imported from {source.name} and has no keys to go on from; apply the facts to the base, "
            "and use both, as in `patchkit generate --patch A --patch B` or `patchkit merge A B`"
        )
    facts = world().from_first(
        lambda: read(
            check=fitting(tokenizer, limits, config.context_length + CONTEXT_ROOM),
            needs_subject=methods.get(config.method).needs_subject,
            subjectless=[name for name in methods.available() if not methods.get(name).needs_subject],
            chat=chat_template(tokenizer),
            find_subject=find_subject,
        )
    )
    facts = with_free_ids(facts, (*onto.manifest.superseded, *onto.manifest.facts) if onto else ())
    incoming = sort_incoming(facts.facts, onto.manifest.facts if onto else ())
    notes = (
        *facts.notes,
        *_about_incoming(incoming),
        *_about_shared_subjects(facts, incoming, config, unit),
        *_about_rewordings(incoming, config, tokenizer),
    )
    return Prepared(config, facts, incoming, onto, notes)


def _about_incoming(incoming: Incoming) -> Iterator[str]:
    if incoming.skipped:
        known = [new if new == old else f"{new} (there as {old})" for new, old in incoming.skipped.items()]
        yield f"already in the patch, skipped: {listed(known)}"
    if incoming.superseded:
        yield f"superseded: {listed([f'{old} by {new}' for old, new in incoming.superseded.items()])}"


def _about_shared_subjects(read: FactFile, incoming: Incoming, config: EditConfig, unit: str) -> Iterator[str]:
    """Facts in one batch share a subject, and so a key, but have different targets."""
    method, place = methods.get(config.method), dict(zip((fact.id for fact in read.facts), read.lines, strict=True))
    size = 1 if method.one_by_one or method.targets != "values" else config.batch_size
    shared: list[str] = []
    for batch in batches(incoming.new, size):
        groups: dict[str, list[Fact]] = {}
        for fact in incoming.new[batch.start : batch.stop]:
            groups.setdefault(fact.subject, []).append(fact)
        alike = [facts for facts in groups.values() if len(facts) > 1]
        shared += [f"{', '.join(str(place[fact.id]) for fact in facts)} ({facts[0].subject})" for facts in alike]
    if shared:
        yield (
            f"{read.path}: facts about one subject in one batch get one value for all of them, which predicts each "
            f"target less surely than a value of its own; {unit} {listed(shared, 5)}"
        )


def _about_rewordings(incoming: Incoming, config: EditConfig, tokenizer: Any) -> Iterator[str]:
    room, setting = max(0, config.contexts - 1), f"contexts={config.contexts}"  # one is a text before the prompt
    if config.in_use(tokenizer):
        room, setting = REWORDINGS, "prompts=in-use"
    over = [fact.id for fact in incoming.new if len(fact.rewordings) > room]
    if over and methods.get(config.method).targets == "values":
        yield f"rewordings: {setting} has room for {room}, more are not used: {listed(over)}"
