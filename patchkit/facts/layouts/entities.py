"""Benchmarks made of knowledge bases: RippleEdits and UniEdit."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from patchkit.facts.layout import Layout, any_of, grouped, layout
from patchkit.facts.record import Record, Refused
from patchkit.facts.schema import Condition, Locality, Probe

_KEPT = ("Relation_Specificity", "Forgetfulness")  # RippleEdits' groups of what an edit must leave alone
_FOLLOWS = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")


@layout
class RippleEdits(Layout):
    """RippleEdits (Cohen et al. 2024), whose sentences hold the target, and whose subject is named by an id alone.

    What two sentences, before and after, have in common is the prompt; the subject is what follows the relation's name
    in it. A record of `recent` has one sentence, which is parted at its "is" where there is but one. A query counts
    where the base answers the condition queries of its test.
    """

    name = "rippleedits"
    marks = (("example_type", "edit"),)
    target_true = "target_true"
    metadata = ("example_type", "subject_id", "target_id", "target_ids", "relation", "query_type", "phrase")

    def split(self, record: Record) -> Iterable[Record]:
        """One part, with prompt, subject and targets taken out of the sentences."""
        edit = record.inside("edit")
        if edit is None:
            raise Refused("edit", "missing; a rippleedits record needs edit")
        new, true = edit.text("prompt"), edit.optional("original_fact.prompt")
        if true is None and new.split().count("is") != 1:
            why = 'missing, and the sentence has not one "is": nothing shows where its target begins'
            raise Refused("edit.original_fact", why)
        part = _parted(new, true, edit.optional("relation") or "")
        return (record.child({**part, **{group: record.get(group) for group in (*_KEPT, *_FOLLOWS)}}, "edit"),)

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """Queries whose answers are to stay, with the first answer."""
        queries = [query for tests in _tests(record, _KEPT).values() for test in tests for query in test]
        return tuple(
            Locality(prompt=query.prompt, target=query.answers[0][0], aliases=query.answers[0][1:]) for query in queries
        )

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """Queries whose answers follow; of a test with the condition OR it is enough to answer one."""
        found = {
            group: tuple(probe for test in tests for probe in test) for group, tests in _tests(record, _FOLLOWS).items()
        }
        return {group: each for group, each in found.items() if each}


def _parted(new: str, true: str | None, relation: str) -> dict[str, Any]:
    """Prompt, subject and targets of a sentence with the target, and of one with the true target if that is known."""
    common = new.split()
    if true is not None:
        alike = takewhile(lambda words: words[0] == words[1], zip(common, true.split(), strict=False))
        common = [word for word, _ in alike]
    if "is" in common:  # what both targets begin with is none of the prompt
        common = common[: len(common) - common[::-1].index("is")]
    stem = " ".join(common)
    ends = [sentence.split()[len(common) :] for sentence in (new, true or "")]
    target, before = (" ".join(words).removesuffix(".") for words in ends)
    named = f"{relation.lower().replace('_', ' ')} of "
    at = stem.lower().find(named)
    start = at + len(named) if relation and at >= 0 else stem.rfind(" of ") + len(" of ")
    subject = stem[start:].rsplit(" ", 1)[0] if stem.rfind(" of ") >= 0 or at >= 0 else ""
    return {"prompt": stem, "subject": subject, "target_new": target, "target_true": before or None}


def _tests(record: Record, groups: Iterable[str]) -> dict[str, list[tuple[Probe, ...]]]:
    """The tests of each group: their queries, or one probe for all where any answer is enough."""
    found: dict[str, list[tuple[Probe, ...]]] = {}
    for group in groups:
        for test in record.objects(group):
            conditions = tuple(
                Condition(prompt=probe.prompt, answers=probe.answers)
                for query in test.objects("condition_queries")
                for probe in _query(query)
            )
            probes = tuple(
                probe.model_copy(update={"conditions": conditions})
                for query in test.objects("test_queries")
                for probe in _query(query)
            )
            alike = len({probe.answers for probe in probes}) == 1
            either = test.optional("test_condition") == "OR" and alike
            found.setdefault(group, []).append(any_of(probes) if either else probes)
    return found


def _query(query: Record) -> tuple[Probe, ...]:
    answers = tuple(
        tuple(text.strip() for text in (answer.text("value"), *answer.texts("aliases")) if text.strip())
        for answer in query.objects("answers")
        if str(answer.value.get("value") or "").strip()
    )
    prompt = query.optional("prompt")
    return (Probe(prompt=prompt, answers=answers),) if prompt and answers else ()


@layout
class UniEdit(Layout):
    """UniEdit (Chen et al. 2025): numbered prompts for what follows and for what is to stay."""

    name = "uniedit"
    marks = (("edit",), ("edit", "generality"), ("edit", "generality", "locality"))
    prompt = "edit.prompt"
    subject = "edit.subject"
    target_new = "edit.target"
    metadata = ("path_type", "paths", "one_hops", "single_path1", "single_path2")
    drops_trailing_space = True

    def locality(self, record: Record) -> tuple[Locality, ...]:
        """What is to stay."""
        parts = [part for listed in grouped(record, "locality").values() for part in listed]
        return tuple(Locality(prompt=part.text("prompt"), target=part.optional("target")) for part in parts)

    def portability(self, record: Record) -> dict[str, tuple[Probe, ...]]:
        """What follows, by the form of its path: a single one, or yes or no over two."""
        found: dict[str, tuple[Probe, ...]] = {}
        for part in (part for listed in grouped(record, "generality").values() for part in listed):
            group, probe = part.optional("path_type") or "generality", _uniedit_probe(part)
            found[group] = (*found.get(group, ()), probe)
        return found


def _uniedit_probe(part: Record) -> Probe:
    return Probe(prompt=part.text("prompt"), answers=((part.text("target").strip(),),))
